"""LTX-Video: LTXPipeline, a rectified-flow transformer over small latents, 32 x 32 x 8 pixels each."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .base import Family
from .video import Video


class LTX(Video, Family):
    """Latents are the pipeline's tokens, but on their grid, [B, length, H, W, C], where the pipeline has [B, length H W, C]."""

    pipeline = "LTXPipeline"
    frames = 161
    native = (512, 704)
    fps = 25.0  # what the pipeline tells its network
    passes_sigmas = True
    takes = frozenset()  # its `timesteps` clash with the sigmas that it passes itself
    lora_targets = (*Family.lora_targets, "ff.net.0.proj", "ff.net.2", "time_embed.linear", "proj_out")

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        text, mask, _, _ = self.pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
        return {"text": text, "mask": mask}

    def forward(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        grid = x_t.shape[1:4]
        out = net(
            hidden_states=x_t.flatten(1, 3).to(net.dtype),
            encoder_hidden_states=cond["text"].to(net.dtype),
            timestep=self.timestep(t),
            encoder_attention_mask=cond["mask"],
            num_frames=grid[0],
            height=grid[1],
            width=grid[2],
            rope_interpolation_scale=(self.frame_multiple / self.fps, self.factor, self.factor),
        ).sample
        return out.unflatten(1, grid)

    def encode(self, images: Tensor) -> Tensor:
        return super().encode(images).movedim(1, -1)

    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipe.vae
        mean, std = self.moments()
        z = latents.to(vae.dtype).movedim(-1, 1) * std + mean
        time = torch.zeros(len(z), device=z.device, dtype=z.dtype) if vae.config.timestep_conditioning else None
        return vae.decode(z, temb=time, return_dict=False)[0].float()  # of newer autoencoders, told that there is no noise left

    def moments(self) -> tuple[Tensor, Tensor]:
        vae = self.pipe.vae
        both = torch.stack([vae.latents_mean, vae.latents_std / vae.config.scaling_factor]).to(vae.device, vae.dtype)
        return both[0, :, None, None, None], both[1, :, None, None, None]

    def packed(self, latents: Tensor) -> Tensor:
        return latents.flatten(1, 3)

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        channels, *grid = super().latent_shape(height, width)
        return (*grid, channels)

    @property
    def factor(self) -> int:
        return self.pipe.vae_spatial_compression_ratio

    @property
    def multiple(self) -> int:
        return 32  # the pipeline insists

    @property
    def tokens(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def frame_multiple(self) -> int:
        return self.pipe.vae_temporal_compression_ratio
