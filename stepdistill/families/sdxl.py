"""Stable Diffusion XL: StableDiffusionXLPipeline, a UNet with two text encoders that is told the size of its picture."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import Family
from .unet import UNet


class SDXL(UNet, Family):
    """Pictures count as uncropped originals of their own size, which is what the pipeline says when nobody says otherwise."""

    pipeline = "StableDiffusionXLPipeline"

    def __init__(self, pipe: Any, size: tuple[int, int] | None = None, frames: int | None = None):
        super().__init__(pipe, size, frames)
        if pipe.vae.dtype == torch.float16 and pipe.vae.config.force_upcast:
            pipe.vae.float()  # it overflows, and the pipeline does the same

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        text, _, pooled, _ = self.pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
        return {"text": text, "pooled": pooled}

    def null_prompts(self) -> dict[str, Tensor]:
        """Zeros where the model was trained with them, else the empty prompt."""
        null = self.encode_prompts([""])
        zeros = self.pipe.config.force_zeros_for_empty_prompt
        return {name: torch.zeros_like(x) for name, x in null.items()} if zeros else null

    def forward(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        size = [side * self.factor for side in x_t.shape[2:]]
        sizes = torch.tensor([*size, 0, 0, *size], device=x_t.device, dtype=net.dtype)  # original, corner of the crop, target
        added = {"text_embeds": cond["pooled"].to(net.dtype), "time_ids": sizes.expand(len(x_t), -1)}
        return self.call(net, x_t, t, cond, added_cond_kwargs=added)
