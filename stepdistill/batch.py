"""What one training iteration is given: a batch, and all of its randomness."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    noise: Tensor  # [B, ...] standard normal latents; for strategies that need pairs, the noise whose endpoint is x0
    cond: dict[str, Tensor]  # encoded prompts, batch-first
    null: dict[str, Tensor] | None = None  # encoded empty prompts; None for a guidance-distilled teacher
    x0: Tensor | None = None  # [B, ...] clean latents, if the strategy needs them
    prompts: tuple[str, ...] = ()
    extra: dict[str, Tensor] = {}  # noqa: RUF012 - never written; whatever else a strategy's `needs` names


def seed_of(*key: object) -> int:
    """A 56-bit seed that depends on every part of the key and on nothing else (no process, no hash randomization)."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=7).digest(), "big")


class Draw:
    """All randomness of one iteration, from (seed, step, global sample index) alone.

    Each sample has its own stream, so it draws the same numbers on any number of processes, with any accumulation, and
    after resuming. `choice` is one value for the whole iteration, on every process.
    """

    def __init__(self, seed: int, step: int, index: Sequence[int], device: torch.device | str = "cpu"):
        self.step, self.device = step, device
        self._shared = random.Random(seed_of(seed, step))
        self._streams = [torch.Generator().manual_seed(seed_of(seed, step, int(i))) for i in index]

    def _each(self, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        return torch.stack([draw(stream) for stream in self._streams]).to(self.device)

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal [B, ...] of the shape and dtype of `like`."""
        return self._each(lambda g: torch.randn(like.shape[1:], generator=g)).to(like.dtype)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        """[B] in [low, high), float32."""
        return self._each(lambda g: torch.rand((), generator=g)) * (high - low) + low

    def integer(self, low: int, high: int) -> Tensor:
        """[B] whole numbers in low..high-1."""
        return self._each(lambda g: torch.randint(low, high, (), generator=g))

    def choice(self, n: int) -> int:
        """One number in 0..n-1 for all samples of all processes."""
        return self._shared.randrange(n)
