"""PixArt-Sigma: PixArtSigmaPipeline, a transformer that predicts eps, and a variance that nobody reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import Family


class PixArt(Family):
    pipeline = "PixArtSigmaPipeline"
    lora_targets = (*Family.lora_targets, "ff.net.0.proj", "ff.net.2", "adaln_single.linear", "proj_out")

    @property
    def sampler_call(self) -> dict[str, Any]:
        return super().sampler_call | {"use_resolution_binning": False}  # it would draw another size and stretch the picture

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        text, mask, *_ = self.pipe.encode_prompt(prompts, False, clean_caption=True)
        return {"text": text, "mask": mask}

    def timestep(self, t: Tensor) -> Tensor:
        return t * (len(self.schedule.theta) - 1)

    def forward(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        size = {"resolution": None, "aspect_ratio": None}  # which the pipeline does not tell either
        out = net(x_t.to(net.dtype), cond["text"].to(net.dtype), self.timestep(t), size, encoder_attention_mask=cond["mask"])
        return out.sample[:, : x_t.shape[1]]
