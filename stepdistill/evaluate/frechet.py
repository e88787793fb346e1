"""Frechet distance between Gaussians fitted to features, in float64 (Heusel et al. 2017, arXiv:1706.08500, Eq. 6)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor


class Moments(NamedTuple):
    mean: Tensor  # [D] float64
    cov: Tensor  # [D, D] float64


def moments(features: ArrayLike | Tensor, weights: ArrayLike | Tensor | None = None) -> Moments:
    """Mean and unbiased covariance of features [N, D]; `weights` [N] are whole numbers, how often each row counts.

    Raises:
        ValueError: features are not [N, D] of finite numbers, or fewer than two rows count.
    """
    x = _double(features)
    if x.ndim != 2 or not x.isfinite().all():
        raise ValueError(f"features of shape {list(x.shape)} must be [N, D] and finite: look at their pictures")
    w = x.new_ones(len(x)) if weights is None else _double(weights)
    n = w.sum()
    if n < 2:
        raise ValueError(f"a covariance needs at least 2 rows of features, not {n:.0f}: give more pictures")
    mean = w @ x / n
    centred = x - mean
    return Moments(mean, (centred * w[:, None]).T @ centred / (n - 1))


def frechet(mean1: ArrayLike | Tensor, cov1: ArrayLike | Tensor, mean2: ArrayLike | Tensor, cov2: ArrayLike | Tensor) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)); means [D], covariances [D, D], positive semi-definite.

    Raises:
        ValueError: shapes disagree, or a covariance is not symmetric and positive semi-definite.
    """
    return _distance(_checked(mean1, cov1), *_rooted(_checked(mean2, cov2)))


def frechet_interval(
    features: ArrayLike | Tensor, reference: Moments, resamples: int = 200, seed: int = 0
) -> tuple[float, float, float]:
    """FD of features [N, D] against fixed reference moments, and its 95 % bootstrap interval over the N pictures.

    Resampling adds the bias of a finite sample a second time, so the resamples' mean lies above the FD; the interval is
    the FD plus the resamples' quantiles around their own mean. It covers the FD of other N pictures on average.

    Returns:
        (fd, low, high), 0 <= low <= fd <= high.
    """
    with _one_thread():
        x, rooted = _double(features), _rooted(_checked(*reference))
        fd = _distance(moments(x), *rooted)
        counts = np.random.default_rng(seed).multinomial(len(x), np.full(len(x), 1 / len(x)), size=resamples)
        draws = np.array([_distance(moments(x, count), *rooted) for count in counts])
    low, high = fd + np.quantile(draws, [0.025, 0.975]) - draws.mean()
    return fd, max(0.0, float(min(low, fd))), float(max(high, fd))


def _double(x: ArrayLike | Tensor) -> Tensor:
    return torch.as_tensor(x if isinstance(x, Tensor) else np.asarray(x)).double()


def _checked(mean: ArrayLike | Tensor, cov: ArrayLike | Tensor) -> Moments:
    mean, cov = _double(mean), _double(cov)
    if mean.ndim != 1 or cov.shape != mean.shape * 2:
        raise ValueError(f"mean {list(mean.shape)} and covariance {list(cov.shape)} must be [D] and [D, D]")
    small = 1e-9 * cov.trace().abs().item()
    if (cov - cov.T).abs().max() > small or torch.linalg.eigvalsh(cov)[0] < -small:
        raise ValueError("a covariance must be symmetric and positive semi-definite: take it from moments(features)")
    return Moments(mean, cov)


def _rooted(at: Moments) -> tuple[Moments, Tensor]:
    """Moments, and the symmetric square root of their covariance."""
    values, vectors = torch.linalg.eigh(at.cov)
    return at, (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def _distance(one: Moments, two: Moments, root: Tensor) -> float:
    """FD, where root = two.cov^(1/2): the roots of C1 C2's eigenvalues are those of root C1 root's."""
    if one.mean.shape != two.mean.shape:
        raise ValueError(f"features have {len(one.mean)} and {len(two.mean)} dimensions; both must come from one judge")
    cross = torch.linalg.eigvalsh(root @ one.cov @ root).clamp(min=0).sqrt().sum()
    gap = (one.mean - two.mean).square().sum()
    return max(0.0, (gap + one.cov.trace() + two.cov.trace() - 2 * cross).item())


@contextmanager
def _one_thread() -> Iterator[None]:
    """Matrices this small are quickest on one thread; on a busy machine waiting for others took 70 times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
