"""Variational score distillation in one step. SwiftBrush, Nguyen and Tran 2023, arXiv:2312.05239; VSD, arXiv:2305.16213."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..fields import ranged
from ..losses import surrogate
from ..sampling import Inference, trailing
from .base import Strategy
from .shared import INSIDE, check_ranges, drop_prompts, generate, renoises


@dataclass
class VSD(Strategy):
    """A one-step student learns from prompts alone: its samples move by the difference between teacher and fake score, which
    keeps learning what the student makes, from the same samples. Both are guided, unlike in DMD; so that it can be, the fake
    score learns a share of the samples without their prompt.

    With a range of guidance scales, one is drawn for each sample: PG-SB, arXiv:2412.02687, whose range is not confirmed.
    """

    guidance: tuple[float, float] = ranged((4.5, 4.5), low=1)  # range of the scale of teacher and fake score
    t_range: tuple[float, float] = ranged((0.02, 0.98), above=0, below=1)  # times at which the two scores are compared
    prompt_dropout: float = ranged(0.1, low=0, high=1)  # share of samples whose prompt the fake score is not told

    roles = ("student", "fake")

    def check(self):
        if self.guidance[0] > self.guidance[1]:
            yield f"guidance: {list(self.guidance)} is no range; write the smaller scale first"
        yield from check_ranges(self, "t_range")

    def players(self, stage):
        return {"student": ("student",), "critic": ("fake",)}

    def losses(self, roles, batch, draw):
        x0 = generate(roles, self.inference(roles.schedule), batch, draw, grad=True)[0].x0
        t, w = roles.schedule.warp(draw.uniform(*self.t_range)), draw.uniform(*self.guidance)  # [B]
        x_t = roles.noise(x0, t, draw.normal(x0))
        with torch.no_grad():
            real = roles.teacher.guided(x_t, t, batch.cond, batch.null, w)
            fake = roles.fake.guided(x_t, t, batch.cond, batch.null, w)
        loss = surrogate(x0, real.sigma**2 * (real.eps - fake.eps))  # omega(t) = sigma_t^2
        yield "student", loss, {"matching": loss}

        x0 = x0.detach()
        t, eps = roles.schedule.warp(draw.uniform(*INSIDE)), draw.normal(x0)
        p = roles.fake(roles.noise(x0, t, eps), t, drop_prompts(batch, draw.uniform() < self.prompt_dropout))
        loss = (p.alpha * (p.eps - eps)).square().mean()
        yield "critic", loss, {"denoising": loss}

    def inference(self, schedule, steps=None):
        if steps not in (None, 1):
            raise ValueError(f"a VSD student takes one step, not {steps}; set steps to 1")
        return Inference(trailing(schedule.grid(1)), renoise=renoises(None, schedule))
