"""Drawings of the embedded world, as a source of pictures."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial

import numpy as np
from PIL import Image

from ..tiny.world import draw, scenes
from .cache import key_of
from .picture import Picture
from .prompts import TINY_COUNT, TINY_SEED

TOGETHER = 64  # drawings made at a time; they share a seed


def drawings(count: int | None) -> Iterator[Picture]:
    """So many drawings (None: a few thousand) of what teachers saw."""
    count = count or TINY_COUNT
    for i, scene in enumerate(scenes(count, TINY_SEED, "seen")):
        yield Picture(f"drawing {i}", key_of("drawing", i), scene.caption, partial(drawing, count, i))


def drawing(count: int, i: int) -> Image.Image:
    return Image.fromarray(_some(count, i // TOGETHER * TOGETHER)[i % TOGETHER])


@lru_cache(maxsize=1)
def _some(count: int, first: int) -> np.ndarray:
    """Drawings [n, 64, 64, 3] from the first on."""
    return draw(scenes(count, TINY_SEED, "seen")[first : first + TOGETHER], TINY_SEED * 1_000_000 + first).images
