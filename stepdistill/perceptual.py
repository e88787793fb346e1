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
WEIGHTS = "https://download.pytorch.org/models/vgg16-397923af.pth"


def installed() -> bool:
    """Whether the package lpips is there."""
    return importlib.util.find_spec("lpips") is not None


@functools.cache
def network(device: torch.device) -> nn.Module:
    """LPIPS with VGG, frozen and in evaluation mode; its first use downloads VGG's weights.

    Raises:
        UserError: the package lpips is not installed, or VGG's weights are neither there nor can be downloaded.
    """
    try:
        import lpips
    except ModuleNotFoundError as error:
        raise UserError(f"LPIPS needs the package {error.name}, which is not installed; {INSTALL}") from None
    try:
        made = lpips.LPIPS(net="vgg", verbose=False)
    except OSError as error:
        raise UserError(
            f"LPIPS needs VGG's weights, and the download failed ({error}); get {WEIGHTS} where there is a network, "
            f"and put it into {torch.hub.get_dir()}/checkpoints"
        ) from None
    return made.to(device).eval().requires_grad_(False)


def lpips(a: Tensor, b: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean LPIPS of pictures a and b [B, 3, H, W] in [-1, 1], with gradient; weight: a factor for each picture [B].

    Raises:
        UserError: as `network` does.
    """
    distance = lpips_each(a, b)
    return (distance if weight is None else weight.to(distance) * distance).mean()


def lpips_each(a: Tensor, b: Tensor) -> Tensor:
    """LPIPS of each picture of a with that of b, both [B, 3, H, W] in [-1, 1], with gradient. [B]

    Raises:
        UserError: as `network` does.
    """
    return network(a.device)(a, b).flatten()
