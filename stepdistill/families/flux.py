"""FLUX.1: FluxPipeline, a rectified-flow transformer whose guidance is distilled (dev: told as an input; schnell: fixed)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kohya import Layers, flux_layers
from .base import Family
from .packed import Packed

GUIDANCE = 3.5  # what the pipeline tells its network if it is told nothing
WIDTH = 3072  # of FLUX.1 and all that was made of it; diffusers' reader of kohya files counts on it


class Flux(Packed, Family):
    pipeline = "FluxPipeline"
    guidance_distilled = True
    kohya_prefix = "lora_unet_"
    comfyui_shifter = "ModelSamplingFlux"
    lora_targets = (
        *Packed.lora_targets,
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp"),
        *("norm.linear", "norm1.linear", "norm1_context.linear"),
    )

    @property
    def sampler_guidance(self) -> float:
        """What the network is told; the pipeline's guidance_scale is this, and nothing else."""
        return GUIDANCE if self.net.config.guidance_embeds else 1.0

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        text, pooled, _ = self.pipe.encode_prompt(prompts, None)
        return {"text": text, "pooled": pooled}

    def forward(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        guidance = cond.get("guidance", torch.full_like(t, GUIDANCE)) if net.config.guidance_embeds else None
        out = net(
            hidden_states=self.packed(x_t).to(net.dtype),
            timestep=self.rounded(t, net.dtype),
            guidance=guidance,
            encoder_hidden_states=cond["text"].to(net.dtype),
            pooled_projections=cond["pooled"].to(net.dtype),
            txt_ids=torch.zeros(cond["text"].shape[1], 3, device=x_t.device),
            img_ids=self.positions(x_t),
        ).sample
        return out.reshape(x_t.shape)

    @property
    def kohya_layers(self) -> Layers:
        return flux_layers(self.net.config.num_layers, self.net.config.num_single_layers)

    def kohya_lack(self) -> str:
        width = self.feature_width(self.net)
        return "" if width == WIDTH else f"diffusers reads FLUX.1's of a width of {WIDTH} alone, and this network's is {width}"

    def feature_block(self, net: nn.Module) -> nn.Module:
        return net.transformer_blocks[-1]  # the last that keeps picture and text apart
