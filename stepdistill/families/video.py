"""What pipelines that make videos share: their autoencoders, whose first latent is one frame and each other one several."""

from __future__ import annotations

import torch
from torch import Tensor


class Video:
    """To be mixed into a `Family`: pixels are [B, 3, frames, H, W], latents (if nothing else is said) [B, C, length, H, W]."""

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Videos in [-1, 1], or pictures [B, 3, H, W] (videos of one frame) -> latents (the posterior's mean)."""
        vae = self.pipe.vae
        videos = images if images.ndim == 5 else images[:, :, None]
        return self.normalized(vae.encode(videos.to(vae.device, vae.dtype)).latent_dist.mean).float()

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> videos [B, 3, frames, H, W], nominally in [-1, 1], differentiable."""
        vae = self.pipe.vae
        return vae.decode(self.denormalized(latents.to(vae.dtype)), return_dict=False)[0].float()

    def normalized(self, z: Tensor) -> Tensor:
        """What the autoencoder makes, [B, C, length, H, W], as the network sees it."""
        return z * self.pipe.vae.config.scaling_factor

    def denormalized(self, latents: Tensor) -> Tensor:
        """The inverse of `normalized`."""
        return latents / self.pipe.vae.config.scaling_factor

    @property
    def length(self) -> int:
        """Latents of a video."""
        return 1 + (self.frames - 1) // self.frame_multiple

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        return (self.net.config.in_channels, self.length, height // self.factor, width // self.factor)

    @property
    def tokens(self) -> int:
        return self.length * super().tokens

    @property
    def factor(self) -> int:
        return self.pipe.vae_scale_factor_spatial

    @property
    def frame_multiple(self) -> int:
        return self.pipe.vae_scale_factor_temporal

    def feature_width(self, net: torch.nn.Module) -> int:
        return net.config.num_attention_heads * net.config.attention_head_dim
