"""Aspect-ratio buckets: sizes of about one area, so that pictures need little cropping and every batch has one shape."""

from __future__ import annotations

import math
from typing import NamedTuple

Size = tuple[int, int]  # height and width in pixels


class Bucket(NamedTuple):
    """Samples whose latents have one shape."""

    shape: tuple[int, ...]  # of one sample's latents
    rows: tuple[int, ...] | None  # of the pictures in it; None: prompts alone, which fit any shape


def bucket_sizes(size: Size, multiple: int) -> list[Size]:
    """Sizes of about the area of `size`, itself among them, from 1:2 to 2:1, in steps of about a sixteenth of the side.

    multiple: what height and width must be multiples of.
    """
    area = size[0] * size[1]
    step = multiple * max(1, round(math.sqrt(area) / 16 / multiple))
    found = {size}
    for width in range(step, round(2 * math.sqrt(area)), step):
        height = round(area / width / step) * step
        if width <= 2 * height and height <= 2 * width:
            found |= {(height, width), (width, height)}
    return sorted(found)


def nearest(width: int, height: int, sizes: list[Size]) -> Size:
    """The size of nearest aspect ratio."""
    return min(sizes, key=lambda size: abs(math.log(size[0] / size[1]) - math.log(height / width)))
