"""How far a student's picture is from its teacher's of the same noise and prompt."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .. import perceptual
from ..errors import UserError

WINDOW = 11  # pixels: the side of SSIM's Gaussian window
PIXELS = 2**22  # of the pictures that are floats at once


def likeness(
    pictures: np.ndarray, teacher: np.ndarray, device: torch.device | str = "cpu", lpips: bool = True
) -> dict[str, np.ndarray]:
    """Distances of uint8 pictures [N, H, W, 3] from the teacher's, picture by picture; each [N] float64, 0 if equal
    (1 - SSIM to 1e-3).

    Returns:
        "rmse", the root of the mean square over pixels and channels, in [0, 1]; "dssim", 1 - SSIM, in [0, 2]; and "lpips"
        if the package lpips is installed and not left out.

    Raises:
        UserError: pictures that are not uint8 [N, H, W, 3] of one shape, or below 11 pixels; LPIPS's weights
            are not there.
    """
    if np.shape(pictures) != np.shape(teacher):
        raise UserError(f"pictures {list(np.shape(pictures))} and the teacher's {list(np.shape(teacher))} differ in shape")
    distances = {"rmse": _rmse, "dssim": dissimilarity} | ({"lpips": perceived} if lpips and perceptual.installed() else {})
    found: dict[str, list[Tensor]] = {name: [torch.empty(0)] for name in distances}
    for a, b in zip(blocks(pictures), blocks(teacher), strict=True):
        a, b = a.to(device), b.to(device)
        for name, far in distances.items():
            found[name].append(far(a, b).cpu())
    return {name: torch.cat(parts).double().numpy() for name, parts in found.items()}


def dissimilarity(a: Tensor, b: Tensor) -> Tensor:
    """1 - SSIM of pictures a and b [B, 3, H, W] in [0, 1], by torchmetrics: Gaussian window of 11 pixels, range 1. [B]

    The mean over pixels and channels; borders are reflected. Wang et al. 2004, doi:10.1109/TIP.2003.819861. In float32,
    where a window's variance is a difference of squares, equal pictures lie up to 1e-3 apart; float64 took 20 times as long.

    Raises:
        UserError: pictures below 11 pixels.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    if min(a.shape[2:]) < WINDOW:
        raise UserError(f"pictures of {a.shape[3]}x{a.shape[2]} pixels; SSIM needs at least {WINDOW}x{WINDOW}: enlarge them")
    return 1 - structural_similarity_index_measure(a, b, reduction="none", data_range=1.0)


def perceived(a: Tensor, b: Tensor) -> Tensor:
    """LPIPS of pictures a and b [B, 3, H, W] in [0, 1]. [B]

    Raises:
        UserError: the package lpips or its weights are not there.
    """
    return perceptual.lpips_each(2 * a - 1, 2 * b - 1)


def floats(pictures: np.ndarray) -> Tensor:
    """uint8 [N, H, W, 3] -> float [N, 3, H, W] in [0, 1].

    Raises:
        UserError: pictures of another kind.
    """
    return torch.from_numpy(np.ascontiguousarray(_checked(pictures))).permute(0, 3, 1, 2).float().div(255)


def blocks(pictures: np.ndarray) -> Iterator[Tensor]:
    """`floats` of at most PIXELS pixels at a time, and of one picture at least."""
    x = _checked(pictures)
    at_once = max(1, PIXELS // max(1, x.shape[1] * x.shape[2]))
    return (floats(x[i : i + at_once]) for i in range(0, len(x), at_once))


def _checked(pictures: np.ndarray) -> np.ndarray:
    x = np.asarray(pictures)
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] != 3:
        raise UserError(f"pictures are {x.dtype} {list(x.shape)}; give uint8 [N, H, W, 3]")
    return x


def _rmse(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().flatten(1).mean(1).sqrt()
