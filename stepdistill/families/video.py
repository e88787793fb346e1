"""What pipelines that make videos share: their autoencoders, whose first latent is one frame and each other one several."""

from __future__ import annotations

from torch import Tensor


class Video:
    """To be mixed into a `Family`: pixels are [B, 3, frames, H, W], latents (if nothing else is said) [B, C, length, H, W]."""

    def encode(self, images: Tensor) -> Tensor:
        """Videos in [-1, 1], or pictures [B, 3, H, W] (videos of one frame) -> latents (the posterior's mean)."""
        return super().encode(images if images.ndim == 5 else images[:, :, None])

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
