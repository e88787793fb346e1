"""How a picture is made as large as a network reads it. Figures of other conventions do not compare: each has its name here.

Pictures are uint8 [H, W, 3]. Legacy bilinear resizing (TensorFlow 1, pytorch-fid) aliases and is not here: arXiv:2104.11222.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image
from PIL.Image import Resampling

PATCH = 299  # pixels a side that the FID network reads


def clean(picture: np.ndarray, size: int = PATCH) -> np.ndarray:
    """float32 [size, size, 3] in [0, 255]: each channel antialiased, bicubic, never rounded (clean-fid, arXiv:2104.11222).

    A picture that is not square is squeezed, as there; see `square`.
    """
    channels = (Image.fromarray(picture[..., k].astype(np.float32)) for k in range(3))
    resized = [np.asarray(channel.resize((size, size), Resampling.BICUBIC)) for channel in channels]
    return np.stack(resized, -1).clip(0, 255)


def centre(picture: np.ndarray, height: int, width: int, corner: Callable[[float], int] = round) -> np.ndarray:
    """The middle [height, width, 3] of a picture that is no smaller; corner rounds half pixels (torchvision's `round` is to
    even, CLIP's is down)."""
    top, left = corner((picture.shape[0] - height) / 2), corner((picture.shape[1] - width) / 2)
    return picture[top : top + height, left : left + width]


def square(
    picture: np.ndarray,
    size: int,
    filter: Resampling = Resampling.LANCZOS,
    corner: Callable[[float], int] = round,
) -> np.ndarray:
    """uint8 [size, size, 3]: the middle square, then antialiased.

    By default as the evaluation of DMD2 (arXiv:2405.14867); bicubic with floor as that of CMMD (arXiv:2401.09603).
    """
    side = min(picture.shape[:2])
    cut = Image.fromarray(np.ascontiguousarray(centre(picture, side, side, corner)))
    return np.asarray(cut.resize((size, size), filter))


def clip_view(picture: np.ndarray, size: int) -> np.ndarray:
    """uint8 [size, size, 3]: the shorter edge bicubic to size, then the middle, as CLIP does (arXiv:2103.00020)."""
    height, width = picture.shape[:2]
    short = min(height, width)
    high, wide = int(size * height / short), int(size * width / short)
    return centre(np.asarray(Image.fromarray(picture).resize((wide, high), Resampling.BICUBIC)), size, size, math.floor)
