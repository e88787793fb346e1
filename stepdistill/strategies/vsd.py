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

    Objective: let the score of what the student makes meet the teacher's, by the gradient of variational score distillation.

        x0    = the student's sample, in one step from noise
        x_t   = alpha_t x0 + sigma_t eps      t ~ U(t_range)
        e     = e_null + w (e_cond - e_null)  of teacher and fake, w ~ U(guidance)
        g     = sigma_t^2 (e_teacher - e_fake)    no normalizer
        L     = 1/2 mean((x0 - sg(x0 - g))^2)     so dL/dx0 = g / entries of x0

        critic  mean((alpha_t (e_fake(x_t) - eps))^2)   of sg(x0)

    sg stops the gradient: teacher and fake score get none. The critic has a t ~ U(0.002, 0.998) and noise of its own, and is
    not told the prompt of a share prompt_dropout of the samples. On flow, drawn times are shifted as the teacher's sampler
    shifts them. Guidance acts on both scores with the same w: where the student's distribution is the unguided teacher's, exact
    scores agree. So guidance shapes the way there and not, as in DMD2, the goal.

    When to choose it: for one step without pictures or pairs, or for SwiftBrush and PG-SB as they were published. DMD2's goal
    is the guided teacher, its gradient is normalized, and it makes students of several steps. A sample and iteration costs 2
    forwards with a gradient (student, critic) and 4 without (teacher 2, fake score 2); both players move every time. Its
    gradient is small, so look at the samples before you judge the rates.

    Healthy curves: seen in vsd_tiny_sd (300 iterations), and in 45 with a critic that hardly learns.

    - student/matching starts at exactly 0, for the fake score begins as the teacher, and nothing pulls the student until that
      has moved. It rose to 0.007 within 20 iterations, and then sank slowly, to 0.0045 after 300.
    - student/grad_norm follows it: from 0 to 0.05 at iteration 30, then 0.02 to 0.03. That is far below optim.clip, and AdamW
      makes up for it.
    - critic/denoising stayed near 0.08, under noise of half its value and more, whether the critic learnt or not: it tells
      nothing. critic/grad_norm sinks from 0.1 to 0.05 where it learns.
    - Sick: matching that stays at 0. With optim.critic_lr at 1e-6 it was at 6e-9 after 45 iterations, and grad_norm at 2e-5:
      what the student then follows is noise. Raise optim.critic_lr.
    """

    guidance: tuple[float, float] = ranged((4.5, 4.5), low=1, high=1000)  # range of the scale of teacher and fake score
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
