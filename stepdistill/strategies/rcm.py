"""Score-regularized continuous-time consistency. rCM, Zheng et al. 2025, arXiv:2510.08431."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..batch import Batch, Draw
from ..fields import ranged
from ..losses import distribution_matching
from ..roles import Roles
from ..sampling import Inference, trailing
from .base import Strategy
from .shared import check_ranges, check_times, fit_fake, own_steps
from .trigflow import check_proposal, consistency, on_pictures, on_trajectories


@dataclass
class RCM(Strategy):
    """sCM's consistency, and beside it, on samples of the student's own, the score difference of DMD: one covers what the
    teacher makes, the other sharpens it.

    Objective: TODO

    When to choose it: TODO

    Healthy curves: TODO student/consistency student/tangent student/matching critic/denoising
    """

    steps: int = ranged(4, low=1, high=50)  # evaluations of the student when it is sampled
    times: tuple[float, ...] | None = ranged(None, above=0, high=1)  # their times, from noise down; null: equal steps
    guidance: float = ranged(5.0, low=1)  # scale of the teacher, in both terms
    trajectory: int | None = ranged(None, low=1)  # points of the teacher's own trajectories for each prompt; null: of pictures
    proposal: tuple[float, float] = (0.7, 1.6)  # mean and standard deviation of log tan theta, of the consistency's angles
    difference: float | None = ranged(0.03, above=0, below=0.5)  # angle of central differences; null: the exact derivative
    tangent: float = ranged(0.1, above=0)  # constant c of the tangent's normalization
    warmup: int = ranged(1000, low=0)  # iterations of consistency alone, in which the share r of the derivative rises to 1
    matching: float = ranged(1.0, above=0)  # weight of the score difference (the paper's 0.01 is to sums, see above)
    rollout: int = ranged(4, low=1, high=50)  # at most so many random steps make the samples that are matched
    t_range: tuple[float, float] = ranged((0.02, 0.98), above=0, below=1)  # times of rollouts, and of the two scores
    student_every: int = ranged(5, low=1)  # of so many iterations one moves the student, and the others the critic
    renoise: bool = True  # new noise after each step of sampling; false: the deterministic step

    roles = ("student", "fake")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"x0"}) if self.trajectory is None else frozenset()

    def check(self):
        yield from check_times(self.steps, self.times)
        yield from check_ranges(self, "t_range")
        yield from check_proposal(self.proposal)
        if self.student_every < 2:
            yield "student_every: the critic never moves with 1; set it to 2 or more"

    def players(self, stage):
        return {"student": ("student",), "critic": ("fake",)}

    def losses(self, roles, batch, draw):
        warm = draw.step < self.warmup
        if warm or draw.step % self.student_every == 0:
            if self.trajectory is None:
                at = on_pictures(roles, batch, draw, self.guidance, self.proposal)
            else:
                at = on_trajectories(roles, batch, draw, self.guidance, self.proposal, self.trajectory)
            share = draw.step / self.warmup if warm else 1.0
            error, size = consistency(roles, at, share, self.tangent, self.difference)
            yield "student", error.mean(), {"consistency": error.mean(), "tangent": size.mean()}
            if not warm:
                loss = self.match(roles, self.generate(roles, batch, draw, grad=True), batch, draw)
                yield "student", self.matching * loss, {"matching": loss}
        else:
            loss = fit_fake(roles, self.generate(roles, batch, draw, grad=False), batch.cond, draw, "trig")
            yield "critic", loss, {"denoising": loss}

    def generate(self, roles: Roles, batch: Batch, draw: Draw, grad: bool) -> Tensor:
        """The student's samples after a random number of steps at random falling times; only the last has a gradient."""
        x_t, t = draw.normal(batch.noise), torch.ones(len(batch.noise)).to(batch.noise)
        with torch.no_grad():
            for _ in range(draw.choice(self.rollout)):
                x0 = roles.student(x_t, t, batch.cond).x0
                t = torch.minimum(t, roles.schedule.warp(draw.uniform(*self.t_range)).to(t))
                x_t = roles.noise(x0, t, draw.normal(x0))
        with torch.set_grad_enabled(grad):
            return roles.student(x_t, t, batch.cond).x0

    def match(self, roles: Roles, x0: Tensor, batch: Batch, draw: Draw) -> Tensor:
        """Distribution matching of samples x0 [B, ...] at one random time for each."""
        t = roles.schedule.warp(draw.uniform(*self.t_range))
        x_t = roles.noise(x0, t, draw.normal(x0))
        with torch.no_grad():
            real = roles.teacher.guided(x_t, t, batch.cond, batch.null, self.guidance)
            fake = roles.fake(x_t, t, batch.cond)
        return distribution_matching(x0, real.x0, fake.x0)

    def inference(self, schedule, steps=None):
        if self.times is not None:
            return Inference(own_steps("rCM", schedule, self.steps, self.times, steps), renoise=self.renoise)
        return Inference(trailing(schedule.grid(steps or self.steps)), renoise=self.renoise)
