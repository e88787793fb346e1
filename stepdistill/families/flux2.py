"""FLUX.2: Flux2Pipeline (dev, told its guidance) and Flux2KleinPipeline (guided, or distilled), rectified flow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import Family, shifted
from .packed import Packed, off_grid, on_grid


class Flux2(Packed, Family):
    """The pipeline's shift depends on the number of steps as well: the schedule here has that of the pipeline's default number,
    whatever the number of steps. It is what a few-step scheduler is exported with."""

    pipeline = "Flux2Pipeline"
    guidance_distilled = True
    lora_targets = (
        *Packed.lora_targets,
        *("linear_in", "linear_out", "to_qkv_mlp_proj"),
        *("double_stream_modulation_img.linear", "double_stream_modulation_txt.linear", "single_stream_modulation.linear"),
        *(f"single_transformer_blocks.{i}.attn.to_out" for i in range(48)),  # dev's 48; a shorter name would mean others too
    )

    def __init__(self, pipe: Any, size: tuple[int, int] | None = None, frames: int | None = None):
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        super().__init__(pipe, size, frames)
        if pipe.scheduler.config.use_dynamic_shifting:
            self.schedule = shifted(
                pipe.scheduler.config, compute_empirical_mu(self.tokens, self.default("num_inference_steps"))
            )

    @property
    def sampler_guidance(self) -> float:
        """What dev's network is told; 1, unguided, of klein."""
        return self.default("guidance_scale") if self.net.config.guidance_embeds else 1.0

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        return {"text": self.pipe.encode_prompt(prompts)[0]}

    def forward(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        told = net.config.guidance_embeds
        words = torch.arange(cond["text"].shape[1], device=x_t.device)
        out = net(
            hidden_states=x_t.flatten(1, 2).to(net.dtype),
            timestep=self.rounded(t, net.dtype),
            guidance=cond.get("guidance", torch.full_like(t, self.sampler_guidance)) if told else None,
            encoder_hidden_states=cond["text"].to(net.dtype),
            txt_ids=nn.functional.pad(words[:, None], (3, 0)),  # 0, 0, 0, place
            img_ids=nn.functional.pad(self.positions(x_t), (0, 1)),  # 0, row, column, 0
        ).sample
        return out.reshape(x_t.shape)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Their mean and standard deviation are those of the autoencoder's batch norm, for each channel of a token."""
        vae = self.pipe.vae
        return self.normalized(vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mean)

    def normalized(self, z: Tensor) -> Tensor:
        """Latents of the autoencoder's [B, C, H, W]."""
        mean, std = self.moments()
        return ((on_grid(z) - mean) / std).float()

    def decode(self, latents: Tensor) -> Tensor:
        mean, std = self.moments()
        return self.pipe.vae.decode(off_grid(latents.to(mean) * std + mean), return_dict=False)[0].float()

    def moments(self) -> tuple[Tensor, Tensor]:
        norm = self.pipe.vae.bn
        return norm.running_mean, (norm.running_var + self.pipe.vae.config.batch_norm_eps).sqrt()

    def packed(self, latents: Tensor) -> Tensor:
        return latents.permute(0, 3, 1, 2)

    def feature_block(self, net: nn.Module) -> nn.Module:
        return net.transformer_blocks[-1]  # the last that keeps picture and text apart


class Flux2Klein(Flux2):
    pipeline = "Flux2KleinPipeline"

    @property
    def guidance_distilled(self) -> bool:
        return bool(self.pipe.config.is_distilled)

    def unpacked(self, made: Tensor) -> Tensor:
        return self.normalized(made)  # its pipeline returns them as its autoencoder is fed
