"""HunyuanVideo: HunyuanVideoPipeline, a rectified-flow transformer whose guidance is distilled and told as an input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import Family
from .video import Video

GUIDANCE = 6.0  # what the pipeline tells its network if it is told nothing


class HunyuanVideo(Video, Family):
    pipeline = "HunyuanVideoPipeline"
    frames = 129
    native = (720, 1280)
    fps = 24.0
    sampler_guidance = GUIDANCE  # only told to the network; true_cfg_scale is what guides
    passes_sigmas = True
    lora_targets = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out"),
        *("norm.linear", "norm1.linear", "norm1_context.linear", "norm_out.linear"),
    )

    @property
    def guidance_distilled(self) -> bool:
        return self.net.config.guidance_embeds

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        text, pooled, mask = self.pipe.encode_prompt(prompts)
        return {"text": text, "pooled": pooled, "mask": mask}

    def forward(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        guidance = cond.get("guidance", torch.full_like(t, GUIDANCE))
        return net(
            hidden_states=x_t.to(net.dtype),
            timestep=self.timestep(t),
            encoder_hidden_states=cond["text"].to(net.dtype),
            encoder_attention_mask=cond["mask"].to(net.dtype),
            pooled_projections=cond["pooled"].to(net.dtype),
            guidance=guidance.to(net.dtype) * 1000,
        ).sample

    def feature_block(self, net: nn.Module) -> nn.Module:
        return net.transformer_blocks[-1]  # the last that keeps video and text apart

    def feature_tokens(self, out: tuple[Tensor, Tensor], x_t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return out[0]  # a block returns (video, text) tokens

    def add_guidance_embedding(self, net: nn.Module) -> None:
        if not net.config.guidance_embeds:
            super().add_guidance_embedding(net)
