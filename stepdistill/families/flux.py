"""FLUX.1: FluxPipeline, a rectified-flow transformer whose guidance is distilled (dev: told as an input; schnell: fixed)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kohya import Layers, flux_layers
from .base import Family

GUIDANCE = 3.5  # what the pipeline tells its network if it is told nothing
WIDTH = 3072  # of FLUX.1 and all that was made of it; diffusers' reader of kohya files counts on it


class Flux(Family):
    """Latents are the pipeline's, packed 2 x 2 into tokens, but on their grid, [B, height, width, 64], where the pipeline has
    [B, height width, 64]: so their shape tells the positions of the tokens, and any aspect ratio will do."""

    pipeline = "FluxPipeline"
    guidance_distilled = True
    passes_sigmas = True
    kohya_prefix = "lora_unet_"
    lora_targets = (  # of both kinds of block, with the layers that a time modulates, as SD3's
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out"),
        *("norm.linear", "norm1.linear", "norm1_context.linear", "norm_out.linear"),
    )

    @property
    def sampler_guidance(self) -> float:
        """What the network is told; the pipeline's guidance_scale is this, and nothing else."""
        return GUIDANCE if self.net.config.guidance_embeds else 1.0

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        text, pooled, _ = self.pipe.encode_prompt(prompts, None)
        return {"text": text, "pooled": pooled}

    def timestep(self, t: Tensor) -> Tensor:
        return t  # the pipeline divides its scheduler's by 1000

    def forward(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        grid = x_t.shape[1:3]
        guidance = cond.get("guidance", torch.full_like(t, GUIDANCE)) if net.config.guidance_embeds else None
        out = net(
            hidden_states=x_t.flatten(1, 2).to(net.dtype),
            timestep=(t * 1000).to(net.dtype) / 1000,  # rounded as the pipeline rounds it
            guidance=guidance,
            encoder_hidden_states=cond["text"].to(net.dtype),
            pooled_projections=cond["pooled"].to(net.dtype),
            txt_ids=torch.zeros(cond["text"].shape[1], 3, device=x_t.device),
            img_ids=torch.cartesian_prod(*(torch.arange(n, device=x_t.device) for n in (1, *grid))),  # 0, row, column
        ).sample
        return out.unflatten(1, grid)

    def encode(self, images: Tensor) -> Tensor:
        return F.pixel_unshuffle(super().encode(images), 2).permute(0, 2, 3, 1)

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(F.pixel_shuffle(latents.permute(0, 3, 1, 2), 2))

    def packed(self, latents: Tensor) -> Tensor:
        return latents.flatten(1, 2)

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        return (height // (2 * self.factor), width // (2 * self.factor), self.net.config.in_channels)

    @property
    def native(self) -> tuple[int, int]:
        side = self.pipe.default_sample_size * self.factor
        return side, side

    @property
    def kohya_layers(self) -> Layers:
        return flux_layers(self.net.config.num_layers, self.net.config.num_single_layers)

    def kohya_lack(self) -> str:
        width = self.feature_width(self.net)
        return "" if width == WIDTH else f"diffusers reads FLUX.1's of a width of {WIDTH} alone, and this network's is {width}"

    def feature_block(self, net: nn.Module) -> nn.Module:
        return net.transformer_blocks[-1]  # the last that keeps picture and text apart

    def feature_tokens(self, out: tuple[Tensor, Tensor]) -> Tensor:
        return out[1]  # a block returns (text, picture) tokens

    def feature_width(self, net: nn.Module) -> int:
        return net.config.num_attention_heads * net.config.attention_head_dim

    def add_guidance_embedding(self, net: nn.Module) -> None:
        if not net.config.guidance_embeds:
            super().add_guidance_embedding(net)
