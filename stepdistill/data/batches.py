"""Which samples an iteration gets: a pure function of seed and step, so that resuming needs no saved position."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..batch import Batch, Draw, seed_of


@dataclass(frozen=True)
class Batches:
    """Encoded data, and the order in which it is visited: a new permutation each epoch.

    Called with (step, part) it gives one part's Batch for this process, and the numbers of its samples in the iteration.
    """

    cond: dict[str, Tensor]  # [N, ...] each, on the CPU
    null: dict[str, Tensor] | None  # [1, ...] each
    prompts: tuple[str, ...]  # N
    x0: Tensor | None  # [N, ...] or None
    shape: tuple[int, ...]  # of one sample's latents
    batch: int  # samples an iteration, over all parts and processes
    parts: int = 1
    seed: int = 0
    rank: int = 0
    world: int = 1
    noise: Tensor | None = None  # [N, ...] that of each row's pair; None: new noise for every sample
    device: torch.device | str = "cpu"

    def __call__(self, step: int, part: int) -> tuple[Batch, range]:
        size = self.batch // (self.parts * self.world)
        first = (part * self.world + self.rank) * size
        index = range(first, first + size)
        rows = torch.tensor([self._row(step * self.batch + i) for i in index])

        def put(x: Tensor) -> Tensor:
            return x.to(self.device, non_blocking=True)

        if self.noise is None:
            noise = Draw(seed_of(self.seed, "noise"), step, index, self.device).normal(torch.empty(size, *self.shape))
        else:
            noise = put(self.noise[rows])
        null = self.null and {name: put(x).expand(size, *x.shape[1:]) for name, x in self.null.items()}
        batch = Batch(
            noise=noise,
            cond={name: put(x[rows]) for name, x in self.cond.items()},
            null=null,
            x0=None if self.x0 is None else put(self.x0[rows]).float(),
            prompts=tuple(self.prompts[i] for i in rows.tolist()),
        )
        return batch, index

    def _row(self, n: int) -> int:
        """The row of the n-th sample that training ever sees."""
        epoch, at = divmod(n, len(self.prompts))
        return int(_order(self.seed, epoch, len(self.prompts))[at])


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, size: int) -> Tensor:
    """A permutation of the rows."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed_of(seed, "order", epoch)))
