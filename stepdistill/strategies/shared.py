"""Pieces that several strategies are made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..batch import Batch, Draw
from ..losses import denoising
from ..roles import Roles
from ..sampling import Inference, ask, rollout
from ..schedules import RectifiedFlow, Schedule

INSIDE = (0.002, 0.998)  # drawn times stay off the ends, where reading one parameterization from another divides by zero


def renoises(choice: bool | None, schedule: Schedule) -> bool:
    """A strategy's `renoise` field; None: new noise on DDPM tables, the deterministic Euler step on rectified flow."""
    return not isinstance(schedule, RectifiedFlow) if choice is None else choice


def generate(roles: Roles, how: Inference, batch: Batch, draw: Draw, grad: bool) -> Tensor:
    """The student's clean sample [B, ...] after a random number of its own steps, the same for the whole iteration.

    Backward simulation, DMD2, arXiv:2405.14867, Sec. 4.4: it walks there from pure noise without gradient, as it will at
    inference; only its last evaluation has one (if grad).
    """
    exit_hop = draw.choice(len(how.hops))
    x_t, _ = rollout(roles, how, batch.noise, batch.cond, draw.normal, exit_hop)
    with torch.set_grad_enabled(grad):
        return ask(roles, how, how.hops[exit_hop], x_t, batch.cond).x0


def fit_fake(roles: Roles, x0: Tensor, cond: dict[str, Tensor], draw: Draw, space: str | None = None) -> Tensor:
    """Denoising score matching of the fake score on the student's samples x0 [B, ...] (detached).

    space: what is compared (see `losses.denoising`); None: what the network predicts.
    """
    t, eps = roles.schedule.warp(draw.uniform(*INSIDE)), draw.normal(x0)
    p = roles.fake(roles.noise(x0, t, eps), t, cond)
    return denoising(p, x0, eps, space or roles.fake.kind)


class Head(nn.Module):
    """Discriminator on a network's tokens [B, L, C] -> logits [B, L], one for each token."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(tokens)[..., 0]
