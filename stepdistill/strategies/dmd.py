"""Distribution matching distillation in one step. Yin et al. 2023, arXiv:2311.18828."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .. import perceptual
from ..fields import ranged
from ..losses import distribution_matching, pseudo_huber
from ..roles import Roles
from ..sampling import Inference, trailing
from .base import Strategy
from .shared import check_ranges, fit_fake, generate, renoises


@dataclass
class DMD(Strategy):
    """A one-step student learns two things at once. Its samples of new noise move to where the teacher finds them likelier
    than a fake score does, which keeps learning what the student makes; and from the noise of a teacher pair it has to make
    that pair's picture, which keeps it from dropping modes.

    Objective: KL(student | teacher) at random noise levels, Eq. 7 and 8, plus a regression on pairs (noise, end of the
    teacher's ODE), Eq. 9. Guidance acts on the teacher alone, on its score and in its pairs; the fake score moves as often as
    the student. LPIPS is the paper's distance of pairs; pseudo-Huber in latents is cheaper and needs no other network.

    When to choose it: for one step, without pictures, where making some thousands of pairs beforehand is affordable. DMD2 needs
    no pairs and takes several steps.

    Healthy curves: student/regression falls at once, then slowly, and ends well above 0 (one step cannot follow the guided
    ODE); student/matching stays of order 1 and hardly falls, since it is divided by the sample's own error; critic/denoising
    rises a little at first, while the student moves away from the teacher, then stays. Matching that grows on and on is a fake
    score that does not keep up: raise optim.critic_lr. Regression that rises is a matching that takes over: raise regression.
    """

    guidance: float = ranged(3.0, low=1)  # scale of the teacher, also in its pairs
    t_range: tuple[float, float] = ranged((0.02, 0.98), above=0, below=1)  # times at which the two scores are compared
    regression: float = ranged(0.25, above=0)  # weight of the pairs' distance; the paper's for LPIPS, which is not confirmed
    distance: Literal["huber", "lpips"] = "huber"  # of a pair: pseudo-Huber in latents, or LPIPS of decoded pictures
    huber: float = ranged(1e-3, above=0)  # constant c of the pseudo-Huber distance
    fake_loss: Literal["eps", "x0", "v", "flow"] | None = None  # space of the critic's error; null: the network's own

    roles = ("student", "fake")
    needs = frozenset({"pairs"})

    def check(self):
        yield from check_ranges(self, "t_range")
        if self.distance == "lpips" and not perceptual.installed():
            yield f"distance: lpips needs a package that is not installed; {perceptual.INSTALL}, or set distance to huber"

    def players(self, stage):
        return {"student": ("student",), "critic": ("fake",)}

    def losses(self, roles, batch, draw):
        how = self.inference(roles.schedule)
        x0, _ = generate(roles, how, batch._replace(noise=draw.normal(batch.noise)), draw, grad=True)
        t = roles.schedule.warp(draw.uniform(*self.t_range))
        x_t = roles.noise(x0, t, draw.normal(x0))
        with torch.no_grad():
            real = roles.teacher.guided(x_t, t, batch.cond, batch.null, self.guidance)
            fake = roles.fake(x_t, t, batch.cond)
        matching = distribution_matching(x0, real.x0, fake.x0)
        regression = self.apart(roles, generate(roles, how, batch, draw, grad=True)[0], batch.x0)
        loss = matching + self.regression * regression
        yield "student", loss, {"matching": matching, "regression": regression}

        loss = fit_fake(roles, x0.detach(), batch.cond, draw, self.fake_loss)
        yield "critic", loss, {"denoising": loss}

    def apart(self, roles: Roles, x0: Tensor, end: Tensor) -> Tensor:
        """The distance of the student's samples from the ends [B, ...] of their pairs."""
        if self.distance == "huber":
            return pseudo_huber(x0, end, self.huber)
        with torch.no_grad():
            end = roles.decode(end)
        return perceptual.lpips(roles.decode(x0), end)

    def inference(self, schedule, steps=None):
        if steps not in (None, 1):
            raise ValueError(f"a DMD student takes one step, not {steps}; set steps to 1")
        return Inference(trailing(schedule.grid(1)), renoise=renoises(None, schedule))
