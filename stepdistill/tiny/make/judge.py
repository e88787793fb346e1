"""The judge: trained on drawings alone, damaged at random so that its features feel blur and noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from ..judge import GRID, WEIGHTS, Judge, judge_loss, load_judge, read, targets, to_net
from ..world import Drawings, Scene, draw, scenes
from .fit import fit, pictures

SEED_CHECK = 13  # drawings that neither the judge nor a teacher trains on
BLUR, NOISE, MOTTLE = 1.2, 0.10, 0.12  # at strength 1: pixels; spread of white and of coarse noise, on [-1, 1]


def make_judge(work: Path, steps: int = 2000, batch: int = 64) -> None:
    """Fit, set the unit of the features, write float16 weights to the package, and print how much of fresh drawings,
    all combinations and held-out ones, it reads right."""
    torch.manual_seed(0)
    pool, drawn = pictures(work)
    images = drawn.images

    def loss(step: int) -> Tensor:
        rows = np.sort(np.random.default_rng([step, 4]).integers(len(images), size=batch))
        wanted = targets([pool[i] for i in rows], Drawings(*(x[rows] for x in drawn)))
        x, strength = damaged(to_net(images[rows]))
        return judge_loss(judge(x), wanted, strength)

    judge = Judge().to(memory_format=torch.channels_last)
    judge = fit("judge", judge, loss, steps, 2e-3, work, ema=0.99)
    with torch.no_grad():
        judge.spread.copy_(torch.cat([judge.features(to_net(images[i : i + 256])) for i in range(0, 4096, 256)]).std(0))
    save_file({name: value.half().contiguous() for name, value in judge.state_dict().items()}, WEIGHTS)
    for split in ("all", "held"):
        fresh = scenes(4000, SEED_CHECK, split)
        shares = accuracy(load_judge(), fresh, draw(fresh, SEED_CHECK))
        print(split, "  ".join(f"{name} {share:.4f}" for name, share in shares.items()), flush=True)


def damaged(x: Tensor) -> tuple[Tensor, Tensor]:
    """Blur, noise and mottle at random strengths, each absent in two pictures of five.

    Args:
        x: [N, 3, 64, 64] in [-1, 1].

    Returns:
        pictures as x, and strengths [N, 3] in [0, 1].
    """
    strength = torch.rand(len(x), 3) * (torch.rand(len(x), 3) < 0.6)
    blur, noise, mottle = strength.T[:, :, None, None, None]
    x = blurred(x, BLUR * blur.flatten())
    coarse = F.interpolate(torch.randn(len(x), 3, GRID, GRID), size=x.shape[2:], mode="bilinear")
    x = x + NOISE * noise * torch.randn_like(x) + MOTTLE * mottle * coarse
    return x.clamp(-1, 1).contiguous(memory_format=torch.channels_last), strength


def blurred(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of 7x7 taps; x [N, C, H, W], sigma [N] in pixels."""
    taps = torch.exp(-0.5 * (torch.arange(-3, 4) / sigma.clamp(min=0.05)[:, None]) ** 2)  # [N, 7]
    taps = (taps / taps.sum(1, keepdim=True)).T[..., None, None, None]  # [7, N, 1, 1, 1]
    h, w = x.shape[2:]
    x = F.pad(x, (3, 3, 3, 3), mode="replicate")
    x = sum(tap * x[:, :, k : k + h] for k, tap in enumerate(taps))
    return sum(tap * x[..., k : k + w] for k, tap in enumerate(taps))


def accuracy(judge: Judge, drawn: list[Scene], drawings: Drawings) -> dict[str, float]:
    """Shares of fresh drawings read right: count and background of pictures, attributes of objects (nearest found)."""
    rights: dict[str, list[bool]] = {name: [] for name in ("background", "count", "size", "colour", "shape", "place")}
    for scene, where, reading in zip(drawn, drawings.position, read(judge, drawings.images), strict=True):
        rights["background"].append(reading.background == scene.background)
        rights["count"].append(len(reading.things) == len(scene.things))
        for thing, (x, y) in zip(scene.things, where, strict=False):
            near = min(reading.things, key=lambda found: np.hypot(found.x - x, found.y - y), default=None)
            for name in ("size", "colour", "shape"):
                rights[name].append(near is not None and getattr(near, name) == getattr(thing, name))
            rights["place"].append(near is not None and np.hypot(near.x - x, near.y - y) < 2)
    return {name: float(np.mean(values)) for name, values in rights.items()}
