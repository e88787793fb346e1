"""Distances of two sets of features by mean discrepancy of a kernel: KID and CMMD. They suit fewer pictures than FD does."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UserError

SIGMA, SCALE = 10.0, 1000.0  # of CMMD, as in its paper
BLOCK = 2048  # rows whose kernels are in memory at once


def kid(
    features: np.ndarray, reference: np.ndarray, subsets: int = 100, size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """KID of features [N, D] and [M, D] by torchmetrics: its mean and spread over random subsets of both, in float64.

    The unbiased squared discrepancy under (x.y / D + 1)^3, so equal laws give 0 on average, and single values may be
    negative. Where a set has fewer than `size` rows, subsets are of half the smaller set: the mean does not depend on the
    size, the spread does. Binkowski et al. 2018, arXiv:1801.01401, Sec. 4.

    Raises:
        UserError: features that do not compare, or fewer than 4 rows.
    """
    x, y = pair(features, reference, least=4)
    smaller = min(len(x), len(y))
    return _kid(x, y, subsets, size if size <= smaller else smaller // 2, seed)


def _kid(x: Tensor, y: Tensor, subsets: int, size: int, seed: int) -> tuple[float, float]:
    from torchmetrics.image.kid import KernelInceptionDistance

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", UserWarning)  # that it keeps the features, which are here already
        torch.manual_seed(seed)
        metric = KernelInceptionDistance(nn.Identity(), subsets=subsets, subset_size=size, sync_on_compute=False)
        metric.update(x, real=False)
        metric.update(y, real=True)
        mean, spread = metric.compute()
    return mean.item(), spread.item()


def cmmd(features: np.ndarray, reference: np.ndarray) -> float:
    """CMMD of CLIP features [N, D] and [M, D], of any length: 1000 MMD^2 under exp(-|x - y|^2 / (2 10^2)) at unit length.

    The biased estimate, as in the authors' program: means over all pairs, each row with itself included, which adds about
    (1 - the mean kernel) / N per set. Jayasumana et al. 2024, arXiv:2401.09603, Eq. 4.

    Raises:
        UserError: features that do not compare, or a row of zeros.
    """
    x, y = pair(features, reference, least=1)
    return SCALE * rbf_mmd(unit(x), unit(y), SIGMA)


def rbf_mmd(x: Tensor, y: Tensor, sigma: float) -> float:
    """Biased squared discrepancy of rows [N, D] and [M, D] under exp(-|x - y|^2 / (2 sigma^2)), a block at a time."""
    return _mean_kernel(x, x, sigma) + _mean_kernel(y, y, sigma) - 2 * _mean_kernel(x, y, sigma)


def _mean_kernel(x: Tensor, y: Tensor, sigma: float) -> float:
    """Mean over all pairs of the kernel less 1, which keeps the digits that a wide kernel, near 1, would lose."""
    total = 0.0
    for a in x.split(BLOCK):
        for b in y.split(BLOCK):
            square = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
            total += torch.expm1(square.clamp(min=0) / (-2 * sigma**2)).sum().item()
    return total / (len(x) * len(y))


def unit(x: Tensor) -> Tensor:
    """Rows at unit length.

    Raises:
        UserError: a row of zeros, which has no direction.
    """
    length = x.norm(dim=1, keepdim=True)
    if (length == 0).any():
        raise UserError(f"row {int((length == 0).flatten().nonzero()[0])} of the features is all zeros: look at its picture")
    return x / length


def pair(features: np.ndarray, reference: np.ndarray, least: int) -> tuple[Tensor, Tensor]:
    """Both as float64, fit to be compared.

    Raises:
        UserError: not [N, D] and [M, D], not finite, or fewer than `least` rows.
    """
    x, y = (torch.as_tensor(rows).double() for rows in (features, reference))
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise UserError(f"features {list(x.shape)} and {list(y.shape)} must be [N, D] and [M, D] of one network")
    if min(len(x), len(y)) < least:
        raise UserError(f"sets of {len(x)} and {len(y)} pictures are too few: give at least {least} of each")
    if not (x.isfinite().all() and y.isfinite().all()):
        raise UserError("features must be finite: look at their pictures")
    return x, y
