"""A picture with its caption, not yet opened; how its file is known again; and how it is fitted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from .cache import key_of

LARGEST = 2**28  # bytes of a picture's file


class Picture(NamedTuple):
    """What a source yields."""

    name: str  # as people know it
    key: str  # of its cache entry: another one if the picture changes
    caption: str
    load: Callable[[], Image.Image]  # raises whatever it likes if the picture is damaged


class Skipped(NamedTuple):
    """What a source yields instead of a picture that cannot be used, or of a file of pictures."""

    name: str
    reason: str


def file_key(path: Path, *within: str | int) -> str:
    """The key of a picture: of its file's place, size and time of change, and of where it is in there."""
    about = path.stat()
    return key_of(str(path.resolve()), about.st_size, about.st_mtime_ns, *within)


def fit(picture: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """uint8 [height, width, 3]: resized (Lanczos) until it just covers that size, then the centre."""
    height, width = size
    scale = max(width / picture.width, height / picture.height)
    wide, high = max(width, round(picture.width * scale)), max(height, round(picture.height * scale))
    left, top = (wide - width) // 2, (high - height) // 2
    resized = picture if picture.size == (wide, high) else picture.resize((wide, high), Image.LANCZOS)
    return np.asarray(resized.crop((left, top, left + width, top + height)))
