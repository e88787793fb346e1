"""Stable Diffusion 1.x and 2.x: StableDiffusionPipeline, a UNet that predicts eps or v."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import Family


class SD(Family):
    pipeline = "StableDiffusionPipeline"
    net_name = "unet"
    kohya_prefix = "lora_unet_"
    lora_targets = (  # those of LCM-LoRA, arXiv:2311.05556
        *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
        *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
    )

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        text, _ = self.pipe.encode_prompt(prompts, self.pipe.text_encoder.device, 1, False)
        return {"text": text}

    def forward(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        timestep = t * (len(self.schedule.theta) - 1)
        guidance = None
        if net.config.time_cond_proj_dim is not None and "guidance" in cond:
            guidance = self.pipe.get_guidance_scale_embedding(  # the pipeline, like LCM, embeds our scale minus 1
                cond["guidance"].cpu() - 1, embedding_dim=net.config.time_cond_proj_dim
            ).to(x_t.device, net.dtype)
        return net(x_t.to(net.dtype), timestep, cond["text"].to(net.dtype), timestep_cond=guidance).sample

    def feature_block(self, net: nn.Module) -> nn.Module:
        return net.mid_block

    def feature_tokens(self, out: Tensor) -> Tensor:
        return out.flatten(2).transpose(1, 2)  # [B, C, H, W] -> [B, HW, C]

    def feature_width(self, net: nn.Module) -> int:
        return net.config.block_out_channels[-1]

    def add_guidance_embedding(self, net: nn.Module, width: int = 256) -> None:
        if net.config.time_cond_proj_dim is None:
            inner = net.time_embedding.linear_1.in_features
            net.time_embedding.cond_proj = nn.Linear(width, inner, bias=False, device=net.device, dtype=net.dtype)
            nn.init.zeros_(net.time_embedding.cond_proj.weight)
            net.register_to_config(time_cond_proj_dim=width)
