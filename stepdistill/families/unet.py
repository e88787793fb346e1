"""What the pipelines around diffusers' UNet2DConditionModel share: one call of it, its layers, its middle."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class UNet:
    """To be mixed into a `Family`."""

    net_name = "unet"
    comfyui_shifter = ""
    kohya_prefix = "lora_unet_"
    lora_targets = (  # those of LCM-LoRA, arXiv:2311.05556
        *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
        *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
    )

    @property
    def multiple(self) -> int:
        return self.factor

    def timestep(self, t: Tensor) -> Tensor:
        return t * (len(self.schedule.theta) - 1)

    def call(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor], **more: Any) -> Tensor:
        """The raw output [B, C, H, W] of net, which reads cond["text"], cond["guidance"] if it embeds one, and `more`."""
        guidance = None
        if net.config.time_cond_proj_dim is not None and "guidance" in cond:
            guidance = self.pipe.get_guidance_scale_embedding(  # the pipeline, like LCM, embeds our scale minus 1
                cond["guidance"].cpu() - 1, embedding_dim=net.config.time_cond_proj_dim
            ).to(x_t.device, net.dtype)
        return net(x_t.to(net.dtype), self.timestep(t), cond["text"].to(net.dtype), timestep_cond=guidance, **more).sample

    def feature_block(self, net: nn.Module) -> nn.Module:
        return net.mid_block

    def feature_tokens(self, out: Tensor, x_t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return out.flatten(2).transpose(1, 2)  # [B, C, H, W] -> [B, HW, C]

    def feature_width(self, net: nn.Module) -> int:
        return net.config.block_out_channels[-1]

    def add_guidance_embedding(self, net: nn.Module, width: int = 256) -> None:
        if net.config.time_cond_proj_dim is None:
            inner = net.time_embedding.linear_1.in_features
            net.time_embedding.cond_proj = nn.Linear(width, inner, bias=False, device=net.device, dtype=net.dtype)
            nn.init.zeros_(net.time_embedding.cond_proj.weight)
            net.register_to_config(time_cond_proj_dim=width)
