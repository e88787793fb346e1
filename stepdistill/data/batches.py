"""Which samples an iteration gets: a pure function of seed and step, so that resuming needs no saved position."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from ..batch import Batch, Draw, seed_of
from .buckets import Bucket
from .cache import Column


@dataclass(frozen=True)
class Batches:
    """Encoded data, and the order in which it is visited: a new permutation each epoch.

    Called with (step, part) it gives one part's Batch for this process, and the numbers of its samples in the iteration. With
    buckets an iteration has samples of one of them. Of pictures, an epoch visits each bucket as often as it has batches, the
    last of which is filled with its first pictures; for prompts alone, the shape of the noise is drawn for each iteration.
    """

    cond: dict[str, Tensor | Column]  # [N, ...] each, on the CPU
    null: dict[str, Tensor] | None  # [1, ...] each
    prompts: tuple[str, ...]  # N
    x0: Tensor | Column | None  # [N, ...] or None
    shape: tuple[int, ...]  # of one sample's latents, without buckets
    batch: int  # samples an iteration, over all parts and processes
    parts: int = 1
    seed: int = 0
    rank: int = 0
    world: int = 1
    noise: Tensor | None = None  # [N, ...] that of each row's pair; None: new noise for every sample
    device: torch.device | str = "cpu"
    buckets: tuple[Bucket, ...] = ()

    def __call__(self, step: int, part: int) -> tuple[Batch, range]:
        size = self.batch // (self.parts * self.world)
        first = (part * self.world + self.rank) * size
        index = range(first, first + size)
        shape, rows = self.samples(step)
        rows = torch.tensor(rows[first : first + size])

        def put(x: Tensor) -> Tensor:
            return x.to(self.device, non_blocking=True)

        if self.noise is None:
            noise = Draw(seed_of(self.seed, "noise"), step, index, self.device).normal(torch.empty(size, *shape))
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

    def samples(self, step: int) -> tuple[tuple[int, ...], list[int]]:
        """The shape of an iteration's latents, and the rows of all its samples."""
        if self.buckets and self.buckets[0].rows is not None:
            epoch, at = divmod(step, len(self.visits))
            k, batch = self.visits[_order(self.seed, (epoch, "visits"), len(self.visits))[at]]
            shape, rows = self.buckets[k]
            order = _order(self.seed, (epoch, k), len(rows))
            return shape, [rows[order[(batch * self.batch + i) % len(rows)]] for i in range(self.batch)]
        shape = self.shape
        if self.buckets:
            shape = self.buckets[Draw(seed_of(self.seed, "bucket"), step, ()).choice(len(self.buckets))].shape
        return shape, [self._row(step * self.batch + i) for i in range(self.batch)]

    @cached_property
    def visits(self) -> list[tuple[int, int]]:
        """The batches of an epoch of pictures: bucket, and which of its batches."""
        return [(k, i) for k, bucket in enumerate(self.buckets) for i in range(-(-len(bucket.rows) // self.batch))]

    def _row(self, n: int) -> int:
        """The row of the n-th sample that training ever sees."""
        epoch, at = divmod(n, len(self.prompts))
        return int(_order(self.seed, epoch, len(self.prompts))[at])


@lru_cache(maxsize=64)
def _order(seed: int, epoch: object, size: int) -> Tensor:
    """A permutation of the rows."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed_of(seed, "order", epoch)))
