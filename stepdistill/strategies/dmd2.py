"""Improved distribution matching distillation. Yin et al. 2024, arXiv:2405.14867."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..batch import Draw
from ..fields import ranged
from ..losses import distribution_matching, gan_critic, gan_student
from ..roles import Roles
from ..sampling import Hop, Inference, trailing
from .base import Strategy
from .shared import INSIDE, Head, fit_fake, generate, renoises


@dataclass
class DMD2(Strategy):
    """The student's own samples are moved to where the teacher finds them likelier than a critic, the fake score, which
    keeps learning what the student makes. Data-free, unless gan adds a discriminator on real pictures.

    Guidance acts on the teacher alone; the critic is never guided.
    """

    steps: int = ranged(4, low=1, high=50)  # evaluations of the student when it is sampled
    times: tuple[float, ...] | None = ranged(None, above=0, high=1)  # their times, from noise down; null: equal steps
    guidance: float = ranged(8.0, low=1)  # scale of the teacher
    t_range: tuple[float, float] = ranged((0.02, 0.98), above=0, below=1)  # times at which the two scores are compared
    student_every: int = ranged(5, low=1)  # critic updates for each of the student: two time-scales, Sec. 4.2
    alternate: bool = False  # no critic update when the student moves; false: both, on the same samples
    fake_loss: Literal["eps", "x0", "v", "flow"] | None = None  # space of the critic's error; null: the network's own
    gan: float = ranged(0.0, low=0)  # weight of the student's GAN loss, Sec. 4.3 (5e-3 for SDXL); 0: no discriminator
    gan_critic: float = ranged(1e-2, above=0)  # weight of the discriminator's own loss
    gan_on: Literal["fake", "teacher"] = "fake"  # whose features the discriminator reads; those of fake learn with it
    renoise: bool | None = None  # sample with new noise after each step; null: on DDPM tables yes, on flow no

    roles = ("student", "fake")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"x0"}) if self.gan else frozenset()

    def check(self):
        if self.times is not None and len(self.times) != self.steps:
            yield f"times: {len(self.times)} of them for {self.steps} steps; give one time a step, or null"
        if self.times is not None and sorted(set(self.times), reverse=True) != list(self.times):
            yield f"times: {list(self.times)} do not fall; write them from noise (1) down"
        if self.t_range[0] >= self.t_range[1]:
            yield f"t_range: {list(self.t_range)} is no range; write the smaller time first"
        if self.alternate and self.student_every < 2:
            yield "alternate: the critic never moves with student_every: 1; set student_every to 2 or more"

    def setup(self, roles):
        if self.gan:
            self.head = Head(roles.fake.width)

    def modules(self):
        return {"head": self.head} if self.gan else {}

    def players(self, stage):
        return {"student": ("student",), "critic": ("fake", *self.modules())}

    def losses(self, roles, batch, draw):
        turn = draw.step % self.student_every == 0
        x0 = generate(roles, self.inference(roles.schedule), batch, draw, grad=turn)
        if turn:
            loss = matching = self.match(roles, x0, batch, draw)
            logs = {"matching": matching}
            if self.gan:
                logs["gan"] = gan_student(self.logits(roles, x0, batch.cond, draw))
                loss = matching + self.gan * logs["gan"]
            yield "student", loss, logs
        if turn and self.alternate:
            return
        x0 = x0.detach()
        loss = fit_fake(roles, x0, batch.cond, draw, self.fake_loss)
        yield "critic", loss, {"denoising": loss}
        if self.gan:
            real, fake = (self.logits(roles, x, batch.cond, draw) for x in (batch.x0, x0))
            loss = gan_critic(real, fake)
            yield "critic", self.gan_critic * loss, {"gan": loss, "real": real.mean(), "fake": fake.mean()}

    def match(self, roles: Roles, x0: Tensor, batch, draw: Draw) -> Tensor:
        """Distribution matching at one random time for each sample, Eq. 3."""
        t = roles.schedule.warp(draw.uniform(*self.t_range))
        x_t = roles.noise(x0, t, draw.normal(x0))
        with torch.no_grad():
            real = roles.teacher.guided(x_t, t, batch.cond, batch.null, self.guidance)
            fake = roles.fake(x_t, t, batch.cond)
        return distribution_matching(x0, real.x0, fake.x0)

    def logits(self, roles: Roles, x0: Tensor, cond: dict[str, Tensor], draw: Draw) -> Tensor:
        """The discriminator on samples noised to a random time, [B, L]."""
        t = roles.schedule.warp(draw.uniform(*INSIDE))
        _, features = roles[self.gan_on].features(roles.noise(x0, t, draw.normal(x0)), t, cond)
        return self.head(features)

    def inference(self, schedule, steps=None):
        hops = trailing(schedule.grid(self.steps)) if self.times is None else tuple(map(Hop, self.times))
        if self.steps % (steps or self.steps):
            raise ValueError(f"a DMD2 student of {self.steps} steps cannot take {steps}; use a divisor of {self.steps}")
        return Inference(hops[:: self.steps // (steps or self.steps)], renoise=renoises(self.renoise, schedule))
