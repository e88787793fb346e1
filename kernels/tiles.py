"""How large a piece of attention one program computes, by what is asked of it and by the GPU's shared memory."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """`rows` queries at a time against `keys` keys, `stages` tiles of which are in flight, by `warps` of 32 threads."""

    rows: int
    keys: int
    stages: int
    warps: int


ROOMY = 200 * 1024  # bytes of shared memory a block, from which the first table holds: Hopper and its successors have 227 KiB

# Widest head: tile, per table. Chosen so that nothing spills at 64 and 128 (docs/jvp.md), not by time: no GPU was at hand.
TILES: dict[str, dict[int, Tile]] = {
    "roomy": {96: Tile(128, 64, 2, 8), 128: Tile(128, 64, 2, 8), 160: Tile(128, 32, 2, 8), 256: Tile(64, 32, 2, 8)},
    "roomy, heavy": {64: Tile(128, 64, 2, 8), 128: Tile(128, 32, 3, 8), 256: Tile(64, 16, 2, 8)},
    "small": {96: Tile(128, 32, 2, 8), 128: Tile(64, 32, 2, 8), 160: Tile(64, 16, 2, 4), 256: Tile(32, 16, 2, 4)},
    "float32": {256: Tile(16, 16, 1, 4)},
}
LAST = Tile(16, 16, 1, 4)


def tiles(d: int, dtype: torch.dtype, flags: dict, shared_memory: int) -> tuple[Tile, ...]:
    """Tiles to try, the best first; a later one where an earlier one asks too much of the GPU.

    Args:
        d: numbers in a head.
        flags: of the kernel. A mask's tile, addresses and float16's gain are in registers too, where wide heads leave few.
        shared_memory: bytes that a block can have.
    """
    wide = sum(widths(d))
    heavy = flags["MASKED"] == 2 or (wide > 96 and (dtype == torch.float16 or not flags["TMA"]))
    table = "float32" if dtype == torch.float32 else "small" if shared_memory < ROOMY else "roomy, heavy" if heavy else "roomy"
    return *(tile for widest, tile in TILES[table].items() if widest >= wide), LAST


def widths(d: int) -> tuple[int, int]:
    """A head dimension as a power of two, at least 16, and perhaps a smaller one: 72 as 64 + 16, 40 as 32 + 16, 112 as 128."""
    whole = max(16, 1 << (d - 1).bit_length())
    part = whole // 2
    rest = max(16, 1 << (d - part - 1).bit_length())
    return (part, rest) if rest < part else (whole, 0)
