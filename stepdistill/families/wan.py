"""Wan 2.1 and 2.2, text to video: WanPipeline, one rectified-flow transformer, or two experts by time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import distributed
from .base import Family
from .video import Video

TEXT_TOKENS = 512  # what the pipeline's max_sequence_length defaults to


class Wan(Video, Family):
    """Latents are [B, C, frames, H, W], of which the first is one picture and each other one four.

    Every token hears its sample's time, so that the network of `expand_timesteps` (Wan 2.2 TI2V) needs nothing of its own.
    """

    pipeline = "WanPipeline"
    frames = 81  # 5 seconds
    lora_targets = (*Family.lora_targets, "ffn.net.0.proj", "ffn.net.2", "time_proj", "proj_out")

    def __init__(self, pipe: Any, size: tuple[int, int] | None = None, frames: int | None = None):
        super().__init__(pipe, size, frames)
        if pipe.config.boundary_ratio is not None:
            self.net = Experts(pipe.transformer, pipe.transformer_2, 1000 * pipe.config.boundary_ratio)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        text, _ = self.pipe.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=TEXT_TOKENS)
        return {"text": text}

    def forward(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return net(x_t.to(net.dtype), self.timestep(t), cond["text"].to(net.dtype))[0]

    def moments(self) -> tuple[Tensor, Tensor]:
        vae = self.pipe.vae
        both = torch.tensor([vae.config.latents_mean, vae.config.latents_std], device=vae.device, dtype=vae.dtype)
        return both[0, :, None, None, None], both[1, :, None, None, None]

    @property
    def native(self) -> tuple[int, int]:
        return (704, 1280) if self.pipe.config.expand_timesteps else (480, 832)

    @property
    def fps(self) -> float:
        return 24.0 if self.pipe.config.expand_timesteps else 16.0

    @property
    def networks(self) -> dict[str, str]:
        experts = ("transformer", "transformer_2")
        return {name: f"{name}." for name in experts} if isinstance(self.net, Experts) else super().networks

    def asked(self, time: float) -> str:
        low = isinstance(self.net, Experts) and 1000 * time < self.net.boundary
        return "transformer_2" if low else "transformer"

    def feature_block(self, net: nn.Module) -> nn.Module:
        return net if isinstance(net, Experts) else middle(net)

    def feature_tokens(self, out: Tensor | tuple[Tensor, Tensor], x_t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return out[1] if isinstance(out, tuple) else out  # experts return (output, tokens), a block tokens


def middle(net: nn.Module) -> nn.Module:
    return net.blocks[len(net.blocks) // 2]


class Experts(nn.Module):
    """Two networks that are one: each sample of a batch goes to `transformer` from the boundary up, else to `transformer_2`.

    Where they are in shares, a process runs also the expert that only samples of others ask for, on one sample, whose result
    counts nothing: it would else wait for weights, and they for its gradients, for ever.
    """

    def __init__(self, transformer: nn.Module, transformer_2: nn.Module, boundary: float):
        """boundary: a timestep, in (0, 1000)."""
        super().__init__()
        self.transformer, self.transformer_2, self.boundary = transformer, transformer_2, boundary

    def forward(self, x_t: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen experts' outputs, shaped as x_t [B, ...], and the tokens [B, L, C] of their middle blocks."""
        high = timestep >= self.boundary  # [B]
        together = distributed.in_shares(self)
        if not together and high.all():
            return with_tokens(self.transformer, x_t, timestep, text)
        if not together and not high.any():
            return with_tokens(self.transformer_2, x_t, timestep, text)
        both = {self.transformer: high.nonzero()[:, 0], self.transformer_2: (~high).nonzero()[:, 0]}
        made, spare = [], []
        for net, rows in both.items():
            asked = len(rows) > 0
            if together and distributed.anyone(asked) and not asked:
                spare.append(with_tokens(net, x_t[:1], timestep[:1], text[:1]))
            elif asked:
                made.append(with_tokens(net, x_t[rows], timestep[rows], text[rows]))
        back = torch.cat(list(both.values())).argsort()
        out, tokens = (torch.cat(parts)[back] for parts in zip(*made, strict=True))
        for other, others in spare:
            out, tokens = out + 0 * other.sum(), tokens + 0 * others.sum()
        return out, tokens

    def rebuilt(self, make: Callable[[nn.Module], nn.Module]) -> Experts:
        """The same of networks that are made of these."""
        return Experts(make(self.transformer), make(self.transformer_2), self.boundary)

    @property
    def config(self) -> Any:
        return self.transformer.config

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.dtype

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    def enable_gradient_checkpointing(self, run: Callable[..., Any]) -> None:
        """As of a network of diffusers: run(block, *args) stands for block(*args)."""
        self.transformer.enable_gradient_checkpointing(run)
        self.transformer_2.enable_gradient_checkpointing(run)


def with_tokens(net: nn.Module, *args: Tensor) -> tuple[Tensor, Tensor]:
    """The output of net(*args), and of its middle block."""
    kept: list[Tensor] = []
    handle = middle(net).register_forward_hook(lambda _module, _args, out: kept.append(out))
    try:
        return net(*args)[0], kept[0]
    finally:
        handle.remove()
