"""What meters keep of pictures, in blocks on disk: made once, whoever is interrupted, by as many processes as there are.

A block is a fixed range of pictures, whatever the batch, and one file of it is either whole or not there. Processes share no
more than the folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from .. import distributed
from ..files import beside

Rows = dict[str, np.ndarray]  # name -> [N, ...]
BLOCK = 128  # pictures of a block: what an interruption loses at most, and what one process makes at a time


def blocks(n: int, group: int = 1) -> list[range]:
    """0..n-1 in ranges of about BLOCK, which divide no group of neighbours; n is a whole number of groups."""
    size = max(1, BLOCK // group) * group
    return [range(i, min(i + size, n)) for i in range(0, n, size)]


def fill(folder: Path, spans: Sequence[range], make: Callable[[range], Rows]) -> Iterator[int]:
    """Make this process's share of the blocks, those excepted that are there and whole; yields how many pictures each has."""
    folder.mkdir(parents=True, exist_ok=True)
    for span in share(spans):
        file = path(folder, span)
        if not whole(file):
            made = {name: np.ascontiguousarray(x) for name, x in make(span).items()}
            with beside(file) as tmp:
                save_file(made, tmp)
        yield len(span)


def share(spans: Sequence[range]) -> Sequence[range]:
    """Those that fall to this process: each `world`-th, so together they are all."""
    return spans[distributed.rank() :: distributed.world()]


def gather(folder: Path, spans: Sequence[range]) -> Rows:
    """All rows in the order of their pictures; a name may lack in some blocks."""
    parts = [load_file(path(folder, span)) for span in spans]
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: np.concatenate([part[name] for part in parts if name in part]) for name in names}


def path(folder: Path, span: range) -> Path:
    return folder / f"{span.start:07d}.safetensors"


def whole(file: Path) -> bool:
    """Whether a block is there and not cut short."""
    try:
        with safe_open(file, "np"):
            return True
    except (OSError, SafetensorError):
        return False
