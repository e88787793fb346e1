"""How large a piece of attention one program computes, by what is asked of it."""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """rows queries at a time against keys keys, `stages` of which are in flight, by `warps` of 32 threads."""

    rows: int
    keys: int
    stages: int
    warps: int


def tiles(d, dtype, flags):
    return [Tile(32, 32, 2, 4)]


def widths(d: int) -> tuple[int, int]:
    """A head dimension as a power of two, at least 16, and perhaps a smaller one: 72 as 64 + 16, 40 as 32 + 16, 112 as 128."""
    whole = max(16, 1 << (d - 1).bit_length())
    part = whole // 2
    rest = max(16, 1 << (d - part - 1).bit_length())
    return (part, rest) if rest < part else (whole, 0)
