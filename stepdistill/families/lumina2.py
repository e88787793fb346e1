"""Lumina-Image 2.0: Lumina2Pipeline, a rectified-flow transformer that reads text and picture as one sequence."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import Family


class Lumina2(Family):
    """Guidance is plain here; the pipeline also scales each guided row to the length of the unguided one, unless it is told
    cfg_normalization=False. Its network's time rises as noise falls, and so does its output."""

    pipeline = "Lumina2Pipeline"
    passes_sigmas = True
    rising = True
    lora_targets = (  # with the layers that a time modulates, as SD3's
        *(*Family.lora_targets, "feed_forward.linear_1", "feed_forward.linear_2", "feed_forward.linear_3"),
        *("norm1.linear", "norm_out.linear_1", "norm_out.linear_2"),
    )

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        text, mask, *_ = self.pipe.encode_prompt(prompts, False)
        return {"text": text, "mask": mask}

    @torch.no_grad()
    def null_prompts(self) -> dict[str, Tensor]:
        *_, text, mask = self.pipe.encode_prompt([""])  # without the words that the pipeline puts before every prompt
        return {"text": text, "mask": mask}

    def timestep(self, t: Tensor) -> Tensor:
        return 1 - t

    def forward(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return -net(x_t.to(net.dtype), self.timestep(t), cond["text"].to(net.dtype), cond["mask"]).sample

    @property
    def native(self) -> tuple[int, int]:
        side = self.pipe.default_image_size
        return side, side

    def feature_block(self, net: nn.Module) -> nn.Module:
        return net.layers[len(net.layers) // 2]

    def feature_tokens(self, out: Tensor, x_t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        count = x_t[0, 0].numel() // 4  # in patches of 2 x 2, after the text
        return torch.stack([row[start : start + count] for row, start in zip(out, cond["mask"].sum(1).tolist(), strict=True)])

    def feature_width(self, net: nn.Module) -> int:
        return net.config.hidden_size
