"""What pictures look like, in some numbers without any network; and how far the looks of two sets of pictures are apart."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .colour import COLOURS, colour
from .likeness import blocks

SIDE, BANDS = 8, 3  # of thumbnails, in pixels; octaves of detail, from the finest
GROUPS = (3 * SIDE * SIDE, len(COLOURS), BANDS)  # columns of a row, which weigh the same as one another


def looks(pictures: np.ndarray) -> Tensor:
    """Rows of uint8 pictures [N, H, W, 3]: a thumbnail, COLOURS, and how much detail there is in each octave. [N, sum(GROUPS)]

    Thumbnails are means over pixels, in [0, 1]; detail is the root mean square of what is lost as the sides are halved.
    """
    parts = [torch.empty(0, GROUPS[0] + GROUPS[2], dtype=torch.float64)]
    for x in blocks(pictures):
        parts.append(torch.cat([F.adaptive_avg_pool2d(x, SIDE).flatten(1), detail(x)], 1).double())
    thumbnail, bands = torch.cat(parts).split([GROUPS[0], GROUPS[2]], 1)
    return torch.cat([thumbnail, torch.from_numpy(colour(pictures)), bands], 1)


def detail(x: Tensor) -> Tensor:
    """The root mean square of each octave of pictures [B, 3, H, W]; 0 of one that they are too small for. [B, BANDS]"""
    bands = []
    for _ in range(BANDS):
        x = x[..., : x.shape[2] // 2 * 2, : x.shape[3] // 2 * 2]
        if not x.numel():
            bands.append(bands[-1].new_zeros(len(x)) if bands else torch.zeros(len(x)))
            continue
        half = F.avg_pool2d(x, 2)
        power = x.square().flatten(1).mean(1) - half.square().flatten(1).mean(1)
        bands.append(power.clamp(min=0).sqrt())
        x = half
    return torch.stack(bands, 1)


def in_units(rows: Tensor, reference: Tensor) -> Tensor:
    """Rows [N, sum(GROUPS)] in which each group of columns is divided by its own spread over the reference's rows."""
    spreads = [part.var(0).sum().sqrt().clamp(min=1e-3) for part in reference.split(GROUPS, 1)]
    return torch.cat([part / spread for part, spread in zip(rows.split(GROUPS, 1), spreads, strict=True)], 1)


def energy(first: Tensor, second: Tensor) -> float:
    """The energy distance of rows [G, n, D] and [G, n, D], mean over the G groups: 2 E|x - y| - E|x - x'| - E|y - y'|.

    Rows of equal index may depend on each other (the same noise), so pairs of them count nowhere: it is 0 on average for equal
    laws, whether they do or not, and may be negative. Szekely and Rizzo 2013, doi:10.1016/j.jspi.2013.03.018.
    """
    return (2 * apart(first, second) - apart(first, first) - apart(second, second)).mean().item()


def apart(first: Tensor, second: Tensor) -> Tensor:
    """Mean distance of rows [G, n, D] of different index, in each group. [G]"""
    n = first.shape[1]
    return others(first, second).sum((1, 2)) / (n * (n - 1))


def others(first: Tensor, second: Tensor) -> Tensor:
    """Distances of rows [G, n, D] to those of other index in their group, 0 elsewhere. [G, n, n]"""
    distances = torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist")
    return distances * (1 - torch.eye(first.shape[1], dtype=first.dtype))


def unlike(thumbnails: Tensor) -> Tensor:
    """How unlike the others of its group each picture is: the mean distance of rows [G, n, D], a root mean square. [G, n]"""
    n, size = thumbnails.shape[1:]
    return others(thumbnails, thumbnails).sum(2) / (n - 1) / size**0.5
