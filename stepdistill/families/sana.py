"""Sana and Sana-Sprint: SanaPipeline and SanaSprintPipeline, a rectified-flow transformer of linear attention.

Sana-Sprint's pipeline and scheduler speak of TrigFlow: an angle, samples of standard deviation sigma_data, and their velocity.
Its network does not: it reads x_t = (1 - t) x0 + t eps at t = sin / (sin + cos) of the angle, and predicts eps - x0, as
Sana's does; what the pipeline makes of that is `Prediction.trig`. So here both are rectified flow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import Family


class Sana(Family):
    pipeline = "SanaPipeline"
    passes_generator = True
    lora_targets = (*Family.lora_targets, "conv_inverted", "conv_point", "time_embed.linear", "proj_out")

    @property
    def sampler_call(self) -> dict[str, Any]:
        height, width = self.size  # the pipeline's default is 1024 pixels, whatever its network was made for
        return super().sampler_call | {"height": height, "width": width, "use_resolution_binning": False}

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        words = self.default("complex_human_instruction")
        text, mask, *_ = self.pipe.encode_prompt(prompts, False, complex_human_instruction=words)
        return {"text": text, "mask": mask}

    @torch.no_grad()
    def null_prompts(self) -> dict[str, Tensor] | None:
        *_, text, mask = self.pipe.encode_prompt([""])  # without the words that the pipeline puts before every prompt
        return {"text": text, "mask": mask}

    def timestep(self, t: Tensor) -> Tensor:
        return t * 1000 * self.net.config.timestep_scale

    def forward(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        text, mask = cond["text"].to(net.dtype), cond["mask"]
        return net(x_t.to(net.dtype), text, self.timestep(t), encoder_attention_mask=mask, guidance=self.told(t, cond)).sample

    def told(self, t: Tensor, cond: dict[str, Tensor]) -> Tensor | None:
        """The guidance [B] that the network hears."""
        return None

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        vae = self.pipe.vae
        return (vae.encode(images.to(vae.device, vae.dtype)).latent * vae.config.scaling_factor).float()

    @property
    def factor(self) -> int:
        return self.pipe.vae_scale_factor

    @property
    def multiple(self) -> int:
        return 32


class SanaSprint(Sana):
    pipeline = "SanaSprintPipeline"
    guidance_distilled = True

    @property
    def sampler_guidance(self) -> float:
        """What the network is told; the pipeline's guidance_scale is this, and nothing else."""
        return self.default("guidance_scale")

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        words = self.default("complex_human_instruction")
        text, mask = self.pipe.encode_prompt(prompts, complex_human_instruction=words)
        return {"text": text, "mask": mask}

    def null_prompts(self) -> None:
        return None

    def timestep(self, t: Tensor) -> Tensor:
        return t

    def told(self, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        guidance = cond.get("guidance", torch.full_like(t, self.sampler_guidance))
        return guidance * self.net.config.guidance_embeds_scale
