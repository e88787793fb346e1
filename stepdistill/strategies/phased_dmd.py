"""Phased distribution matching distillation. Phased DMD, arXiv:2510.27684 (v3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..batch import Batch, Draw
from ..diffusion import like
from ..fields import ranged
from ..losses import distribution_matching, surrogate
from ..roles import Roles
from ..sampling import Inference, step
from .base import Strategy
from .shared import check_ranges, check_times, fit_fake, generate, own_steps, times_above


@dataclass
class PhasedDMD(Strategy):
    """The student's steps fall into phases, each with a student of its own: the first takes noise to an intermediate noise
    level s, the next one on from there. A phase is trained when those before it are done, and matches the teacher's marginals
    between s and noise alone, so that a student of the noisy half keeps the variety that many steps from noise have.

    The critic, new in each phase, never sees clean samples: it learns scores above s from samples at s.
    """

    steps: int = ranged(4, low=2, high=50)  # evaluations of the students when they are sampled
    phases: int = ranged(2, low=1, high=50)  # with as many of the steps each
    phase_steps: int = ranged(1000, low=1)  # iterations of each phase; the last one lasts until train.steps
    times: tuple[float, ...] | None = ranged(None, above=0, high=1)  # of the steps, from noise down; null: equal steps
    guidance: float = ranged(4.0, low=1)  # scale of the teacher
    t_range: tuple[float, float] = ranged((0.02, 0.98), above=0, below=1)  # of the matching's times, as shares of s to 1
    weight: Literal["kl", "dmd"] = "kl"  # of a time: the KL gradient itself, as in the paper; or DMD's normalized difference
    student_every: int = ranged(5, low=1)  # critic updates for each of the student
    fake_loss: Literal["eps", "x0", "v", "flow"] = "eps"  # space of the critic's error; the paper's is flow
    clamp: float | None = ranged(None, above=0)  # c in the weight min(1, c sigma^2) of that error, Eq. 13 (10); null: 1
    renoise: bool = False  # new noise after each step; false: the deterministic step, as in the paper

    @property
    def roles(self) -> tuple[str, ...]:
        return (*self.students, "fake")

    @property
    def students(self) -> tuple[str, ...]:
        return tuple(f"student_{k + 1}" for k in range(self.phases))

    @property
    def stages(self) -> int:
        return self.phases

    def check(self):
        yield from check_times(self.steps, self.times)
        yield from check_ranges(self, "t_range")
        if self.steps % self.phases:
            yield f"phases: {self.phases} do not divide {self.steps} steps; choose a divisor"

    def stage(self, step):
        return min(step // self.phase_steps, self.phases - 1)

    def enter(self, roles, stage):
        roles.fake.reset()

    def players(self, stage):
        return {"student": (self.students[stage],), "critic": ("fake",)}

    def losses(self, roles, batch, draw):
        how, phase, turn = self.inference(roles.schedule), self.stage(draw.step), draw.step % self.student_every == 0
        each = len(how.hops) // self.phases
        p, _ = generate(roles, how, batch, draw, turn, range(phase * each, (phase + 1) * each))
        s = how.hops[(phase + 1) * each].time if phase + 1 < self.phases else 0.0
        with torch.set_grad_enabled(turn):
            x = step(roles, how, p, s, draw.normal) if s else p.x0  # from any step of a phase straight to its end
        if turn:
            loss = self.match(roles, x, p.x0, s, batch, draw)
            yield "student", loss, {"matching": loss}
        loss = fit_fake(roles, x.detach(), batch.cond, draw, self.fake_loss, s, self.clamp)
        yield "critic", loss, {"denoising": loss}

    def match(self, roles: Roles, x: Tensor, x0: Tensor, s: float, batch: Batch, draw: Draw) -> Tensor:
        """Distribution matching above s of samples x at s [B, ...], which were predicted to become x0."""
        t = times_above(s, roles.schedule, draw, *self.t_range)
        since = torch.full_like(t, s) if s else None
        x_t = roles.noise(x, t, draw.normal(x), since)
        with torch.no_grad():
            real = roles.teacher.guided(x_t, t, batch.cond, batch.null, self.guidance)
            fake = roles.fake(x_t, t, batch.cond)
        if self.weight == "dmd":
            return distribution_matching(x, real.x0, fake.x0, x0=x0)
        return surrogate(x, like(roles.transition(t, since)[0], x) * (fake.score - real.score))

    def inference(self, schedule, steps=None):
        hops = own_steps("Phased DMD", schedule, self.steps, self.times, steps)
        if len(hops) % self.phases:
            raise ValueError(f"{self.phases} phases cannot share {len(hops)} steps; use a multiple of {self.phases}")
        hops = [hop._replace(role=self.students[k * self.phases // len(hops)]) for k, hop in enumerate(hops)]
        return Inference(tuple(hops), renoise=self.renoise)
