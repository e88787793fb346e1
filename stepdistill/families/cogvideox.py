"""CogVideoX 2B, 5B and 1.5: CogVideoXPipeline, a transformer that predicts v on a table which ends in pure noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import Family
from .video import Video


class CogVideoX(Video, Family):
    """Latents are [B, length, C, H, W]. Version 1.5 sees them in pairs: where their number is odd, one more comes first, and
    is thrown away before decoding."""

    pipeline = "CogVideoXPipeline"
    frames = 49
    lora_targets = (
        *(*Family.lora_targets, "ff.net.0.proj", "ff.net.2"),
        *("norm1.linear", "norm2.linear", "norm_out.linear", "proj_out"),
    )

    def __init__(self, pipe: Any, size: tuple[int, int] | None = None, frames: int | None = None):
        super().__init__(pipe, size, frames or pipe.transformer.config.sample_frames)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        text, _ = self.pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
        return {"text": text}

    def timestep(self, t: Tensor) -> Tensor:
        return t * (len(self.schedule.theta) - 1)

    def forward(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        length, _, height, width = x_t.shape[1:]
        rope = None
        if net.config.use_rotary_positional_embeddings:
            size = height * self.factor, width * self.factor
            rope = self.pipe._prepare_rotary_positional_embeddings(*size, length, x_t.device)
        text = cond["text"].to(net.dtype)
        return net(x_t.to(net.dtype), text, self.timestep(t), image_rotary_emb=rope).sample

    def encode(self, images: Tensor) -> Tensor:
        latents = super().encode(images).transpose(1, 2)
        return torch.cat([latents[:, :1]] * self.spare + [latents], 1)

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents[:, self.spare :].transpose(1, 2))

    @property
    def spare(self) -> int:
        """Latents before the first."""
        return -super().length % (self.net.config.patch_size_t or 1)

    @property
    def length(self) -> int:
        return super().length + self.spare

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        channels, length, *grid = super().latent_shape(height, width)
        return (length, channels, *grid)

    @property
    def native(self) -> tuple[int, int]:
        return self.net.config.sample_height * self.factor, self.net.config.sample_width * self.factor

    @property
    def fps(self) -> float:
        return 16.0 if self.net.config.patch_size_t else 8.0

    def feature_tokens(self, out: tuple[Tensor, Tensor], x_t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return out[0]  # a block returns (video, text) tokens
