"""From a sampler to figures: what a suite asks for is made block by block, and each meter reads what it kept of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import distributed
from .meters import Figures, Meter, Shown
from .provenance import digest
from .rows import Rows, blocks, fill, gather, share

Sampler = Callable[[list[str], int], np.ndarray]  # (captions, index of the first) -> uint8 [N, H, W, 3]
Progress = Callable[[int, int], None]  # (pictures done, pictures in all)

VARIED = 1_000_000  # index of the first picture's noise where many pictures of one prompt are asked for


class Asked(NamedTuple):
    """Pictures to be made, and who looks at them."""

    prompts: list[str]
    meters: tuple[Meter, ...]
    first: int = 0  # index of the first one's noise
    group: int = 1  # so many neighbours are pictures of one prompt, and stay in one block


@dataclass(frozen=True)
class Suite:
    """What is measured of every candidate."""

    name: str
    sets: dict[str, Asked]
    decides: dict[str, Any] = field(default_factory=dict)  # what figures depend on besides the meters, for their provenance

    @property
    def n(self) -> int:
        return len(self.sets["plain"].prompts)

    @property
    def compared(self) -> dict[str, Any]:
        """All that decides figures besides whoever is measured."""
        varied = self.sets.get("varied")
        found = {
            "preset": self.name,
            "n": self.n,
            "prompts": digest([asked.prompts for asked in self.sets.values()]),
            "groups": f"{len(varied.prompts) // varied.group} prompts x {varied.group}" if varied else "none",
        }
        for meter in (meter for asked in self.sets.values() for meter in asked.meters):
            found = merged(found, meter.about)
        return merged(found, self.decides)

    @property
    def shown(self) -> int:
        """How many of the first pictures are kept as they are."""
        return max((meter.count for meter in self.sets["plain"].meters if isinstance(meter, Shown)), default=0)


def make(sample: Sampler, suite: Suite, folder: Path, progress: Progress = lambda done, of: None) -> None:
    """Make and keep what is not kept yet, on all processes; returns when every process is done.

    Args:
        sample: a picture's noise must depend on its index alone.
        folder: of this sampler in this suite and of no other; after an interruption its blocks are found there.
        progress: told of the pictures of this process.

    Raises:
        ValueError: the sampler's pictures are not uint8 [N, H, W, 3].
    """
    spans = spans_of(suite)
    of = sum(len(span) for all_of in spans.values() for span in share(all_of))
    done = 0
    for name, asked in suite.sets.items():
        for made in fill(folder / name, spans[name], keeper(sample, asked)):
            done += made
            progress(done, of)
    distributed.wait()


def collect(suite: Suite, folder: Path) -> dict[str, Rows]:
    """What was kept for each meter, by its name, in the order of the pictures."""
    kept: dict[str, Rows] = {}
    for name, spans in spans_of(suite).items():
        rows = gather(folder / name, spans)
        for meter in suite.sets[name].meters:
            mark = f"{meter.name}/"
            kept[meter.name] = {key.removeprefix(mark): x for key, x in rows.items() if key.startswith(mark)}
    return kept


def spans_of(suite: Suite) -> dict[str, list[range]]:
    return {name: blocks(len(asked.prompts), asked.group) for name, asked in suite.sets.items()}


def keeper(sample: Sampler, asked: Asked) -> Callable[[range], Rows]:
    """What makes the pictures of one block, and returns what its meters keep of them."""

    def block(span: range) -> Rows:
        prompts = asked.prompts[span.start : span.stop]
        pictures = checked(sample(prompts, asked.first + span.start), len(prompts))
        return {
            f"{meter.name}/{key}": x for meter in asked.meters for key, x in meter.keep(pictures, prompts, span.start).items()
        }

    return block


def figures(suite: Suite, kept: Mapping[str, Rows]) -> Figures:
    """The figures of all meters."""
    meters = (meter for asked in suite.sets.values() for meter in asked.meters)
    found: Figures = {"n": suite.n}
    for meter in meters:
        found |= meter.figures(kept[meter.name])
    return found


def merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Both mappings, and those inside of them, in one."""
    both = {name: merged(one[name], value) for name, value in other.items() if isinstance(value, Mapping) and name in one}
    return {**one, **other, **both}


def checked(pictures: np.ndarray, n: int) -> np.ndarray:
    right = isinstance(pictures, np.ndarray) and pictures.dtype == np.uint8 and pictures.ndim == 4
    if not right or len(pictures) != n or pictures.shape[3] != 3:
        got = f"{pictures.dtype} {list(pictures.shape)}" if isinstance(pictures, np.ndarray) else type(pictures).__name__
        raise ValueError(f"the sampler returned {got} for {n} captions; return a uint8 array [{n}, height, width, 3]")
    return pictures
