"""Continuous-time consistency distillation. sCM, Lu and Song 2024, arXiv:2410.11081."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..diffusion import like
from ..fields import ranged
from ..roles import Roles
from ..sampling import Inference, trailing
from .base import Strategy
from .shared import INSIDE, check_times, own_steps
from .trigflow import Points, angle, check_proposal, consistency, on_pictures, on_trajectories, predicted, seen, turned


@dataclass
class SCM(Strategy):
    """The student learns to say from every point of the teacher's trajectory where that trajectory ends, as in LCM, but without
    a grid.

    Objective: TODO

    When to choose it: TODO

    Healthy curves: TODO student/consistency student/tangent
    """

    steps: int = ranged(2, low=1, high=50)  # evaluations of the student when it is sampled
    times: tuple[float, ...] | None = ranged(None, above=0, high=1)  # their times, from noise down; null: equal steps
    guidance: float = ranged(5.0, low=1)  # scale of the teacher
    velocity: Literal["teacher", "data"] = "teacher"  # dx/dtheta: distillation, or training on pictures without a teacher
    trajectory: int | None = ranged(None, low=1)  # points of the teacher's own trajectories for each prompt; null: of pictures
    proposal: tuple[float, float] = (0.7, 1.6)  # mean and standard deviation of log tan theta (rCM's; sCM's is (-0.3, 1.4))
    difference: float | None = ranged(0.03, above=0, below=0.5)  # angle of central differences; null: the exact derivative
    tangent: float = ranged(0.1, above=0)  # constant c of the tangent's normalization
    warmup: int = ranged(1000, low=0)  # iterations in which the share r of the derivative rises to 1
    adaptive: bool = True  # weigh angles by the error that is learnt for them, Sec. 4.2; false: all alike
    intervals: tuple[int, int] | None = ranged(None, low=2)  # discrete time as in iCT: first and last number; null: continuous
    double_every: int = ranged(100, low=1)  # iterations after which that number doubles
    huber: float = ranged(5.4e-4, above=0)  # constant c of the pseudo-Huber distance in discrete time
    renoise: bool = True  # new noise after each step of sampling; false: the deterministic step

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"x0"}) if self.trajectory is None else frozenset()

    def check(self):
        yield from check_times(self.steps, self.times)
        if self.velocity == "data" and self.trajectory is not None:
            yield "trajectory: it is the teacher's own, and velocity data asks for none; set trajectory to null"
        yield from check_proposal(self.proposal)
        if self.intervals is not None and self.intervals[0] > self.intervals[1]:
            yield f"intervals: {list(self.intervals)} do not grow; write the smaller number first"

    def setup(self, roles):
        self.errors = Errors()

    def modules(self):
        return {"errors": self.errors} if self.adaptive else {}

    def players(self, stage):
        return {"student": ("student", "errors") if self.adaptive else ("student",)}

    def losses(self, roles, batch, draw):
        if self.trajectory is None:
            at = on_pictures(roles, batch, draw, self.guidance if self.velocity == "teacher" else None, self.proposal)
        else:
            at = on_trajectories(roles, batch, draw, self.guidance, self.proposal, self.trajectory)
        if self.intervals is None:
            share = min(1.0, draw.step / self.warmup) if self.warmup else 1.0
            error, size = consistency(roles, at, share, self.tangent, self.difference)
            logs = {"consistency": error.mean(), "tangent": size.mean()}
        else:
            error = self.jump(roles, at, draw.step)
            logs = {"consistency": error.mean()}
        loss = self.errors(at.theta, error) if self.adaptive else error
        yield "student", loss.mean(), logs

    def jump(self, roles: Roles, at: Points, step: int) -> Tensor:
        """Pseudo-Huber distance [n] of clean predictions an interval apart, over the interval. iCT, arXiv:2310.14189."""
        least, most = (angle(roles.schedule, t, at.theta) for t in (INSIDE[0], 1.0))
        first, last = self.intervals
        below = at.theta - most / min(first * 2 ** (step // self.double_every), last)
        end = below < least  # the trajectory ends within the interval
        below = torch.where(end, 0.0, below)
        with torch.no_grad():
            x = turned(at.x, at.velocity, below - at.theta)
            target = roles.student(*seen(roles.schedule, x, below.clamp(min=least)), at.cond).x0
            target = torch.where(like(end, x) > 0, x, target)
        square = (predicted(roles, at).x0 - target).square().flatten(1).mean(1)
        return ((square + self.huber**2).sqrt() - self.huber) / (at.theta - below)

    def inference(self, schedule, steps=None):
        if self.times is not None:
            return Inference(own_steps("sCM", schedule, self.steps, self.times, steps), renoise=self.renoise)
        return Inference(trailing(schedule.grid(steps or self.steps)), renoise=self.renoise)


class Errors(nn.Module):
    """The logarithm of the error that is usual at an angle, which weighs errors: the w of arXiv:2410.11081, Eq. 8."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, 32), nn.SiLU(), nn.Linear(32, 1))
        nn.init.zeros_(self.layers[-1].weight)

    def forward(self, theta: Tensor, error: Tensor) -> Tensor:
        """The weighted loss [n] of errors [n] at angles theta [n]: exp(-w) error / tan(theta) + w."""
        usual = self.layers(theta.tan().log()[:, None])[:, 0]
        return (-usual).exp() * error / theta.tan() + usual
