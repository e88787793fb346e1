"""How unlike one another pictures are: the Vendi score of their features, and mean distances within a group of pictures."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .likeness import PIXELS, dissimilarity, floats, perceived
from .mmd import unit


def vendi(features: np.ndarray) -> float:
    """The number of unlike pictures that features [N, D] amount to: 1 if all point one way, N if all are orthogonal.

    exp of the entropy of the eigenvalues of K / N, K the cosines of all pairs. Friedman and Dieng 2022,
    arXiv:2210.02410, Eq. 4. It depends on N, so figures compare at equal N only.

    Raises:
        UserError: features are not [N, D] and finite, or a row is all zeros.
    """
    x = torch.as_tensor(features).double()
    if x.ndim != 2 or not len(x) or not x.isfinite().all():
        raise UserError(f"features of shape {list(x.shape)} must be [N, D] and finite: look at their pictures")
    x = unit(x) / len(x) ** 0.5
    values = torch.linalg.eigvalsh(x @ x.T if len(x) < x.shape[1] else x.T @ x)  # the same but for zeros
    values = values[values > 0]
    return (values * values.log()).sum().neg().exp().item()


def pairwise_ssim_distance(pictures: np.ndarray, device: torch.device | str = "cpu") -> float:
    """Mean 1 - SSIM over all pairs of a group of uint8 pictures [N, H, W, 3]: 0 if all are equal.

    Raises:
        UserError: fewer than two pictures, or what `likeness` refuses.
    """
    return _mean_over_pairs(pictures, dissimilarity, device)


def pairwise_lpips(pictures: np.ndarray, device: torch.device | str = "cpu") -> float:
    """Mean LPIPS (VGG) over all pairs of a group of uint8 pictures [N, H, W, 3], as DMD2 measures diversity.

    Raises:
        UserError: fewer than two pictures, or the package lpips or its weights are not there.
    """
    return _mean_over_pairs(pictures, perceived, device)


def _mean_over_pairs(pictures: np.ndarray, distance: Callable[[Tensor, Tensor], Tensor], device: torch.device | str) -> float:
    """Mean distance of pictures a and b, both [B, 3, H, W] in [0, 1], over all pairs."""
    x = floats(pictures).to(device)
    if len(x) < 2:
        raise UserError(f"diversity needs at least 2 pictures of a prompt, not {len(x)}: sample more")
    first, second = torch.tensor(list(combinations(range(len(x)), 2))).T
    at_once = max(1, PIXELS // (x.shape[2] * x.shape[3]))
    parts = zip(first.split(at_once), second.split(at_once), strict=True)
    return torch.cat([distance(x[a], x[b]) for a, b in parts]).double().mean().item()
