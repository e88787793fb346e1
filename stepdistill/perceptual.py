"""LPIPS, a distance of pictures in the features of a VGG network. Zhang et al. 2018, arXiv:1801.03924.

The only user of the package lpips, which is imported when it is first needed.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor, nn

from .errors import UserError

INSTALL = "install it: pip install 'stepdistill[lpips]'"


def installed() -> bool:
    """Whether the package lpips is there."""
    return importlib.util.find_spec("lpips") is not None


@functools.cache
def network(device: torch.device) -> nn.Module:
    """LPIPS with VGG, frozen and in evaluation mode; its first use downloads VGG's weights.

    Raises:
        UserError: the package lpips is not installed.
    """
    try:
        import lpips
    except ModuleNotFoundError as error:
        raise UserError(f"LPIPS needs the package {error.name}, which is not installed; {INSTALL}") from None
    return lpips.LPIPS(net="vgg", verbose=False).to(device).eval().requires_grad_(False)


def lpips(a: Tensor, b: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean LPIPS of pictures a and b [B, 3, H, W] in [-1, 1], with gradient; weight: a factor for each picture [B].

    Raises:
        UserError: the package lpips is not installed.
    """
    distance = network(a.device)(a, b).flatten()
    return (distance if weight is None else weight.to(distance) * distance).mean()
