"""What the pipelines share whose latents are packed 2 x 2 into the tokens of their transformer: FLUX, FLUX.2, Qwen-Image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Packed:
    """To be mixed into a `Family`.

    Latents are the pipeline's tokens, but on their grid, [B, height, width, C], where the pipeline has [B, height width, C]: so
    their shape tells the positions of the tokens, and any aspect ratio will do.
    """

    passes_sigmas = True
    lora_targets = (  # of both kinds of block, with the layers that a time modulates, as SD3's
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("norm_out.linear", "proj_out"),
    )

    def timestep(self, t: Tensor) -> Tensor:
        return t  # the pipeline divides its scheduler's by 1000

    def rounded(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """Times [B] as the pipeline rounds them."""
        return (t * 1000).to(dtype) / 1000

    def positions(self, x_t: Tensor) -> Tensor:
        """Those of the picture's tokens: 0, row, column, each [height width, 3]."""
        return torch.cartesian_prod(*(torch.arange(n, device=x_t.device) for n in (1, *x_t.shape[1:3])))

    def encode(self, images: Tensor) -> Tensor:
        return on_grid(super().encode(images))

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(off_grid(latents))

    def packed(self, latents: Tensor) -> Tensor:
        return latents.flatten(1, 2)

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        return (height // (2 * self.factor), width // (2 * self.factor), self.net.config.in_channels)

    @property
    def native(self) -> tuple[int, int]:
        side = self.pipe.default_sample_size * self.factor
        return side, side

    def feature_tokens(self, out: tuple[Tensor, Tensor], x_t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return out[1]  # a block that keeps picture and text apart returns (text, picture)

    def add_guidance_embedding(self, net: nn.Module) -> None:
        if not net.config.guidance_embeds:
            super().add_guidance_embedding(net)


def on_grid(z: Tensor) -> Tensor:
    """The autoencoder's latents [B, C, 2 height, 2 width] as tokens on their grid [B, height, width, 4 C]."""
    return F.pixel_unshuffle(z, 2).permute(0, 2, 3, 1)


def off_grid(latents: Tensor) -> Tensor:
    """Tokens on their grid [B, height, width, 4 C] as the autoencoder's latents [B, C, 2 height, 2 width]."""
    return F.pixel_shuffle(latents.permute(0, 3, 1, 2), 2)
