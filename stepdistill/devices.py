"""Where the parts of a pipeline lie: on the device while they are needed, else in the computer's own memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

IDLE = torch.device("cpu")  # where parts wait


def place(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def move(module: nn.Module, device: torch.device) -> None:
    module.to(device)


@contextmanager
def placed(modules: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Modules on a device, and afterwards where they were before. Nothing moves that is there already."""
    homes = [(module, home) for module in modules if (home := place(module)) != device]
    for module, _ in homes:
        move(module, device)
    try:
        yield
    finally:
        for module, home in homes:
            move(module, home)


@contextmanager
def tiled(vae: nn.Module, size: tuple[int, int]) -> Iterator[None]:
    """An autoencoder that decodes pictures of that height and width one by one and in tiles, if they are larger than a tile."""
    tile = getattr(vae, "tile_sample_min_size", None) or getattr(vae, "tile_sample_min_height", None)
    if tile is None or max(size) <= tile:
        yield
        return
    vae.enable_tiling()
    vae.enable_slicing()
    try:
        yield
    finally:
        vae.disable_tiling()
        vae.disable_slicing()
