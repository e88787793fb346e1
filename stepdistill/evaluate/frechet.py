"""Frechet distance between Gaussians fitted to features, in float64 (Heusel et al. 2017, arXiv:1706.08500, Eq. 6).

torchmetrics computes the distance. It takes rows of features: moments alone are given to it as rows that have them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from ..errors import UserError


class Moments(NamedTuple):
    mean: Tensor  # [D] float64
    cov: Tensor  # [D, D] float64


def needed(dim: int) -> int:
    """Fewest pictures whose covariance in dim features has full rank; an FD wants many more, 10,000 for Inception's 2048."""
    return dim + 1


def moments(features: ArrayLike | Tensor) -> Moments:
    """Mean and unbiased covariance of features [N, D].

    Raises:
        ValueError: features are not [N, D] of finite numbers, or there are fewer than two rows.
    """
    x = _rows(features)
    if len(x) < 2:
        raise ValueError(f"a covariance needs at least 2 rows of features, not {len(x)}: give more pictures")
    mean = x.mean(0)
    centred = x - mean
    return Moments(mean, centred.T @ centred / (len(x) - 1))


def frechet(mean1: ArrayLike | Tensor, cov1: ArrayLike | Tensor, mean2: ArrayLike | Tensor, cov2: ArrayLike | Tensor) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)); means [D], covariances [D, D], positive semi-definite.

    Raises:
        ValueError: shapes disagree, or a covariance is not symmetric and positive semi-definite.
    """
    one, two = _checked(mean1, cov1), _checked(mean2, cov2)
    return _distance(_having(one), one.mean, two)


def frechet_interval(features: ArrayLike | Tensor, reference: Moments) -> tuple[float, float, float]:
    """FD of features [N, D] against fixed reference moments, and its 95 % interval over the N pictures.

    The interval is FD -+ 1.96 s by the delta method: s^2 is the variance over pictures of their influence on FD, over N
    (`influence`). It covers the FD that other N pictures have on average, with the bias of N pictures included (`bias`).
    Measured in the judge's features, it agrees with the bootstrap within a fifth where FD is well above its bias. Of
    drawings themselves, whose FD is all bias, it is 1.6 times as wide as it should be, the bootstrap 1.9 times.

    Returns:
        (fd, low, high), 0 <= low <= fd <= high.

    Raises:
        UserError: N pictures cannot have a covariance of full rank in D dimensions.
    """
    x = _rows(features)
    n, dim = x.shape
    if n < needed(dim):
        raise UserError(
            f"{n} pictures are too few for a Frechet distance in {dim} features: give at least {needed(dim)}, and for "
            f"figures that compare, {10_000 if dim > 1000 else 2048:,}"
        )
    reference = _checked(*reference)
    fd = _distance(x, x.mean(0), reference)
    half = 1.96 * influence(x, reference).std().item() / n**0.5
    return fd, max(0.0, fd - half), fd + half


def influence(features: ArrayLike | Tensor, reference: Moments) -> Tensor:
    """How FD would change, per unit of weight, if a row of features [N, D] counted more: the derivative at the sample. [N]

    With y = x_i - m1: 2 (m1 - m2).y + y'Gy - tr(G C1), where G = 1 - C2^(1/2) (C2^(1/2) C1 C2^(1/2))^(-1/2) C2^(1/2)
    is the derivative of FD by C1. It is taken on the directions in which both covariances are not zero.
    """
    x = _rows(features)
    one, root = moments(x), _root(reference.cov)
    values, vectors = torch.linalg.eigh(root @ one.cov @ root)
    inverse = torch.where(values > 1e-12 * values[-1], values.rsqrt(), 0.0)  # of the square root; NaN is not chosen
    slope = torch.eye(len(root), dtype=root.dtype) - root @ (vectors * inverse) @ vectors.T @ root
    y = x - one.mean
    return 2 * y @ (one.mean - reference.mean) + ((y @ slope) * y).sum(1) - (slope * one.cov).sum()


def bias(one: Moments, two: Moments, n: int) -> float:
    """How far FD of n pictures drawn from N(m1, C1), against N(m2, C2), lies above the true FD on average, to order 1/n.

    The mean's error adds tr(C1); the root is concave, and its second derivative under the covariance of a Wishart
    matrix adds the rest, with s_i the square roots of the eigenvalues of C1 C2:
    (tr(C1) + 1/2 sum_ij s_i s_j / (s_i + s_j) + 1/4 sum_i s_i) / n. It holds where n is far above the dimension. If the
    reference is a sample too, add bias(two, one, its n).
    """
    one, two = _checked(*one), _checked(*two)
    root = _root(two.cov)
    s = torch.linalg.eigvalsh(root @ one.cov @ root).clamp(min=0).sqrt()
    s = s[s > 0]
    pairs = (s[:, None] * s / (s[:, None] + s)).sum()
    return ((one.cov.trace() + pairs / 2 + s.sum() / 4) / n).item()


def _double(x: ArrayLike | Tensor) -> Tensor:
    return torch.as_tensor(x if isinstance(x, Tensor) else np.asarray(x)).double()


def _rows(features: ArrayLike | Tensor) -> Tensor:
    x = _double(features)
    if x.ndim != 2 or not x.isfinite().all():
        raise ValueError(f"features of shape {list(x.shape)} must be [N, D] and finite: look at their pictures")
    return x


def _checked(mean: ArrayLike | Tensor, cov: ArrayLike | Tensor) -> Moments:
    mean, cov = _double(mean), _double(cov)
    if mean.ndim != 1 or cov.shape != mean.shape * 2:
        raise ValueError(f"mean {list(mean.shape)} and covariance {list(cov.shape)} must be [D] and [D, D]")
    small = 1e-9 * cov.trace().abs().item()
    if (cov - cov.T).abs().max() > small or torch.linalg.eigvalsh(cov)[0] < -small:
        raise ValueError("a covariance must be symmetric and positive semi-definite: take it from moments(features)")
    return Moments(mean, cov)


def _root(cov: Tensor) -> Tensor:
    """The symmetric square root."""
    values, vectors = torch.linalg.eigh(cov)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def _having(at: Moments) -> Tensor:
    """Rows [2 D, D] with exactly this mean and unbiased covariance: the mean, plus and minus the columns of a root."""
    steps = _root(at.cov) * ((2 * len(at.mean) - 1) / 2) ** 0.5
    return at.mean + torch.cat([steps, -steps])


def _distance(rows: Tensor, mean: Tensor, two: Moments) -> float:
    """FD by torchmetrics; shifted by the rows' mean, for it would square whatever the two means share."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    if mean.shape != two.mean.shape:
        raise ValueError(f"features have {len(mean)} and {len(two.mean)} dimensions; both must come from one judge")
    network = nn.Identity()
    network.num_features = len(mean)
    metric = FrechetInceptionDistance(network, sync_on_compute=False)  # of this process alone: others wait elsewhere
    metric.update(rows - mean, real=False)
    metric.update(_having(two) - mean, real=True)
    return max(0.0, metric.compute().item())
