"""Z-Image: ZImagePipeline, a rectified-flow transformer that reads lists of pictures and of texts of any length."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import Family
from .text import padded, ragged


class ZImage(Family):
    """The pipeline's guidance_scale is ours minus 1. Its network's time rises as noise falls, and so does its output."""

    pipeline = "ZImagePipeline"
    sampler_guidance = 0.0
    passes_sigmas = True
    rising = True
    native = (1024, 1024)
    lora_targets = (  # with the layers that a time modulates, as SD3's
        *(*Family.lora_targets, "w1", "w2", "w3"),
        *(f"noise_refiner.{i}.adaLN_modulation.0" for i in range(2)),
        *(f"layers.{i}.adaLN_modulation.0" for i in range(30)),  # the last layer has a SiLU of such a name
        *("all_final_layer.2-1.linear", "all_final_layer.2-1.adaLN_modulation.1"),
    )

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        text, _ = self.pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False)  # it writes into its list
        return padded(text, self.default("max_sequence_length"))

    def timestep(self, t: Tensor) -> Tensor:
        return (1000 - t * 1000) / 1000  # rounded as the pipeline does

    def forward(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        pictures = list(x_t.to(net.dtype)[:, :, None])  # of one frame
        texts = ragged(cond["text"].to(net.dtype), cond["mask"])
        return -torch.stack(net(pictures, self.timestep(t), texts).sample)[:, :, 0]

    def feature_block(self, net: nn.Module) -> nn.Module:
        return net.layers[len(net.layers) // 2]

    def feature_tokens(self, out: Tensor, x_t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return out[:, : x_t[0, 0].numel() // 4]  # the picture comes first, in patches of 2 x 2

    def feature_width(self, net: nn.Module) -> int:
        return net.config.dim
