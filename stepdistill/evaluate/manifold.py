"""Precision, recall, density and coverage: whether two sets of features lie within one another's neighbourhoods.

A set's manifold is the union of balls around its rows, each reaching to the row's k-th nearest neighbour in the set.
Kynkaanniemi et al. 2019, arXiv:1904.06991, Eq. 1 and 2; Naeem et al. 2020, arXiv:2002.09797, Eq. 3 and 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .mmd import pair

BLOCK = 2048  # rows whose distances to a whole set are in memory at once


class PRDC(NamedTuple):
    precision: float  # share of pictures within the reference's manifold
    recall: float  # share of the reference within the pictures' manifold
    density: float  # in how many of the reference's balls a picture lies, over k; 1 is expected of equal laws, no upper limit
    coverage: float  # share of the reference's balls that hold a picture


def precision_recall(features: np.ndarray, reference: np.ndarray, k: int = 5) -> PRDC:
    """The four figures of features [N, D] against [M, D], in Euclidean distance and float64, a block at a time.

    Balls hold their border. All four depend on N and M, so figures compare at equal counts only; the papers take k = 3 for
    precision and recall, and 5 for density and coverage.

    Raises:
        UserError: features of other shapes or not finite, or k or fewer rows.
    """
    if k < 1:
        raise UserError(f"{k} neighbours: give k of at least 1")
    x, y = pair(features, reference, least=k + 1)
    shift = y.mean(0)  # squares of distances lose no digits to a common mean
    x, y = x - shift, y - shift
    slack = 1e-9 * torch.cat([x, y]).square().sum(1).mean()  # far above rounding: a row on a border is in the ball
    reach_x, reach_y = _radii(x, k) + slack, _radii(y, k) + slack
    balls, recalled, covered = torch.zeros(len(x)), 0, 0
    for rows, square in _squares(y, x):
        held = square <= reach_y[rows, None]  # [rows, N] pictures in the balls of some reference rows
        balls += held.sum(0)
        covered += held.any(1).sum().item()
        recalled += (square <= reach_x).any(1).sum().item()
    return PRDC((balls > 0).double().mean().item(), recalled / len(y), balls.double().mean().item() / k, covered / len(y))


def _squares(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Squared distances of some rows of x to all of y: (which rows, [rows, M])."""
    length = y.square().sum(1)
    for i in range(0, len(x), BLOCK):
        rows = slice(i, i + BLOCK)
        yield rows, x[rows].square().sum(1)[:, None] + length - 2 * x[rows] @ y.T


def _radii(x: Tensor, k: int) -> Tensor:
    """Squared distance of each row to its k-th nearest other row. [N]"""
    return torch.cat([square.kthvalue(k + 1, dim=1).values for _, square in _squares(x, x)])  # a row is its own nearest
