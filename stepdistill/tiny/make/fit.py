"""The loop that fits every network of the embedded world, and the drawings that autoencoder and judge learn from."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..world import Drawings, Scene, draw, scenes
from .muon import Muon

POOL = 40_000  # pictures that autoencoder and judge train on
SEED_FIT, SEED_TEACH = 11, 12  # drawings' seeds; evaluation uses others (see evaluate/tiny.py)
OUTER = ("conv_in", "conv_out", "proj_out", "pos_embed", "time_embedding", "time_text_embed")  # first and last layers


def fit(
    name: str,
    nets: nn.Module,
    loss: Callable[[int], Tensor],
    steps: int,
    lr: float,
    work: Path,
    ema: float = 0.999,
    warm: int = 100,
    cool: float = 0.4,
    muon: bool = False,
) -> nn.Module:
    """Minimize loss(step) over nets; returns the moving average of nets, of decay `ema`. Resumes from work/name.pt.

    The rate rises for `warm` steps, stays at lr, and falls linearly to zero over the last share `cool` of the steps; with
    more steps a finished fit goes on. AdamW moves everything, or with `muon` only what Muon is not made for: vectors, and the
    first and last layers.

    Raises:
        RuntimeError: a gradient is not finite.
    """
    path, shadow = work / f"{name}.pt", copy.deepcopy(nets).requires_grad_(False)
    inner = {n: p for n, p in nets.named_parameters() if muon and p.ndim > 1 and not n.startswith(OUTER)}
    outer = [p for n, p in nets.named_parameters() if n not in inner]
    optimizers = [torch.optim.AdamW(outer, lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)]
    optimizers += [Muon(inner.values(), lr=lr)] if muon else []
    start, spent, shown = 0, 0.0, 0.0
    if path.exists():
        state = torch.load(path, weights_only=True)
        nets.load_state_dict(state["nets"])
        shadow.load_state_dict(state["shadow"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        start, spent = state["step"], state["seconds"]
    began, mean = time.time() - spent, None
    for step in range(start, steps):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = lr * min(1.0, (step + 1) / warm, (steps - step) / (cool * steps))
        torch.manual_seed(1_000_003 * step)
        value = loss(step)
        nets.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(nets.parameters(), 1.0, error_if_nonfinite=True)
        for optimizer in optimizers:
            optimizer.step()
        decay = min(ema, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(shadow.parameters()), list(nets.parameters()), 1 - decay)
            for kept, live in zip(shadow.buffers(), nets.buffers(), strict=True):
                kept.copy_(live)
        mean = value.item() if mean is None else 0.98 * mean + 0.02 * value.item()
        last = step + 1 == steps
        if last or time.time() - shown > 10:
            shown = time.time()
            left = (shown - began) / (step + 1) * (steps - step - 1)
            print(f"{name} {step + 1}/{steps}  loss {mean:.4f}  {shown - began:.0f} s, {left:.0f} s left", flush=True)
        if last or (step + 1) % 200 == 0:
            state = {"nets": nets.state_dict(), "shadow": shadow.state_dict()}
            state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
            torch.save(state | {"step": step + 1, "seconds": time.time() - began}, work / f"{name}.tmp")
            (work / f"{name}.tmp").replace(path)
    return shadow.eval()


def pictures(work: Path) -> tuple[list[Scene], Drawings]:
    """The drawings that autoencoder and judge learn from, all combinations included."""
    path, told = work / "pictures.npz", scenes(POOL, SEED_FIT)
    if not path.exists():
        np.savez(path, **draw(told, SEED_FIT)._asdict())
    with np.load(path) as saved:
        return told, Drawings(**saved)
