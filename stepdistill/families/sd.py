"""Stable Diffusion 1.x and 2.x: StableDiffusionPipeline, a UNet that predicts eps or v."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import Family
from .unet import UNet


class SD(UNet, Family):
    pipeline = "StableDiffusionPipeline"

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        text, _ = self.pipe.encode_prompt(prompts, self.pipe.text_encoder.device, 1, False)
        return {"text": text}

    def forward(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return self.call(net, x_t, t, cond)
