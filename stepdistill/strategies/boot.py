"""Data-free distillation with bootstrapping. BOOT, Gu et al. 2023, arXiv:2306.05544."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..batch import Batch
from ..diffusion import like
from ..fields import ranged
from ..roles import Denoiser, Roles
from ..sampling import Hop, Inference
from .base import Strategy
from .shared import begin_target, move_target, renoises


@dataclass
class BOOT(Strategy):
    """The student sees pure noise alone and is told a time, and learns which signal the teacher's solver has made of that noise
    by then: each from what it says itself of the time before. So it never needs a point of a trajectory, and no data.

    Its network hears another time than that of its input; told 0, it says what becomes of the noise in the end.

    Objective: one solver step of the guided teacher from the student's own signal y(z, t) must give the next one.

        x_t    = alpha_t y(z, t) + sigma_t eps    eps = z / sigma_1
        D      = D_null + w (D_cond - D_null)     of the teacher at x_t
        y_s    = y(z, t) + kappa (D - y(z, t))    t on the grid, s next below
        kappa  = 1 - alpha_t sigma_s / (alpha_s sigma_t), but 1 where s = 0
        L      = mean((y(z, s) - sg(y_s))^2)

        boundary  where t = 1: y(z, 1) = 0, so that x_1 = z; weight beta
        heun      D is the mean of D at x_t and where its step arrives

    sg stops the gradient: it reaches y(z, s) alone. y(z, t) comes of the student itself or, with ema, of its average. The step
    is exactly DDIM (flow: Euler) in terms of y, so a student without loss is where that sampler takes z in as many steps. Where
    alpha_1 = 0, as on flow, kappa is 1 at t = 1, and the boundary loss the paper's, |y - D(z, 1)|^2. DDPM tables leave alpha_1
    above 0, but a sampler starts from z there too: hence y(z, 1) = 0 and the sigma_1 in eps. The grid stands for the paper's
    delta; its weights w(t) / delta^2 are not confirmed, and here all t weigh the same.

    When to choose it: for one step from prompts alone, where nothing is to learn against anything else, and where the pictures
    should keep the layout that the teacher makes of the same noise. A sample and iteration costs 4 forwards, of which 1 has a
    gradient (teacher 2, student 2), as LCM's; heun adds 2. Each point of the grid is learnt from the one above it, errors and
    all, so begin with few: 4 and 6 did alike on tiny-sd. Its error is squared, and blurs what one step cannot follow: there,
    VSD came nearer in as many minutes (docs/strategies.md). The network has to hear another time than its scheduler's: a few
    lines more in diffusers (the card prints them), and nothing that ComfyUI or A1111 can do.

    Healthy curves: seen in boot_tiny_sd (400 iterations).

    - student/bootstrapping falls steeply while the network learns to hear the time (1.05 to 0.19 within 30 iterations), then
      slowly, to 0.08 after 200 and 0.07 after 400, under noise of a quarter of its value. It compares the student with itself:
      it can be small while errors add up from point to point, so judge by the samples.
    - student/boundary compares it with the teacher, where t = 1: 0.3 at first, 0.2 for 40 iterations, then down to 0.07 after
      200 and 0.05 after 300, under noise of half its value. It grows with guidance (at 2 it began at 0.1 and was at 0.03 after
      200). An iteration that draws no t = 1 logs 0: with a grid of 6 and 16 samples, 1 in 25.
    - student/grad_norm lies around 0.4 throughout, now and then above 1, and once in 100 iterations above 2.
    """

    guidance: float = ranged(4.0, low=1, high=1000)  # scale of the teacher
    grid: int = ranged(8, low=1, high=1000)  # solver steps N from noise to data; the student is told the points below noise
    boundary: float = ranged(1.0, low=0, high=1000)  # weight beta of the boundary's samples beside the others (not confirmed)
    solver: Literal["ddim", "heun"] = "ddim"  # of the teacher's step; heun asks it twice (reported, not confirmed)
    # iterations in which t spreads from 1 over the grid (not confirmed); 0: at once
    progressive: int = ranged(0, low=0, high=10**8)
    ema: float | None = ranged(None, low=0, below=1)  # decay of the target network (0.95); null: the student itself

    @property
    def roles(self) -> tuple[str, ...]:
        return ("student",) if self.ema is None else ("student", "target")

    def enter(self, roles, stage):
        begin_target(roles)

    def losses(self, roles, batch, draw):
        z, times = batch.noise, roles.schedule.grid(self.grid)
        times = torch.tensor(times, dtype=z.dtype, device=z.device)
        n = draw.integer(self.grid - self.reach(draw.step) + 1, self.grid + 1)
        t, s, first = times[n], times[n - 1], n == self.grid  # [B], s < t
        with torch.no_grad():
            y = signal(roles.get("target", roles.student), batch, t)
            target = self.descend(roles, batch, torch.where(like(first, z) == 1, 0, y), t, s)
        error = (signal(roles.student, batch, s) - target).square().flatten(1).mean(1)  # [B]
        loss = torch.where(first, self.boundary * error, error).mean()
        yield "student", loss, {"bootstrapping": mean_of(error, ~first), "boundary": mean_of(error, first)}

    def reach(self, step: int) -> int:
        """How many points of the grid, from noise down, t may be."""
        return math.ceil(self.grid * min(1.0, (step + 1) / self.progressive)) if self.progressive else self.grid

    def descend(self, roles: Roles, batch: Batch, y: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The signal at times s [B], by one step of the guided teacher from the signal y [B, ...] at t.

        With u = alpha / sigma the teacher's ODE is d(u y) / du = D: its Euler step is DDIM, its Heun step has the mean of D.
        """
        (_, s_1), (a_t, s_t), (a_s, s_s) = map(roles.schedule.alpha_sigma, (torch.ones_like(t), t, s))
        kappa = like(torch.where(s == 0, 1, 1 - a_t * s_s / (a_s * s_t)), y)
        eps = batch.noise / like(s_1, y)

        def clean(y: Tensor, t: Tensor) -> Tensor:
            return roles.teacher.guided(roles.noise(y, t, eps), t, batch.cond, batch.null, self.guidance).x0

        d = clean(y, t)
        if self.solver == "heun":  # but the last step is DDIM's: at s = 0 the teacher would only repeat what it is shown
            d = torch.where(like(s, y) == 0, d, (d + clean(y.lerp(d, kappa), s)) / 2)
        return y.lerp(d, kappa)

    def after_step(self, roles, moved):
        move_target(roles, moved, self.ema)

    def inference(self, schedule, steps=None):
        if steps not in (None, 1):
            raise ValueError(f"a BOOT student takes one step, not {steps}; set steps to 1")
        return Inference((Hop(1.0),), renoise=renoises(None, schedule), told=0.0)


def signal(role: Denoiser, batch: Batch, told: Tensor) -> Tensor:
    """What a role makes of the batch's noise [B, ...] where its network is told times [B]."""
    return role(batch.noise, torch.ones_like(told), batch.cond, told).x0


def mean_of(error: Tensor, which: Tensor) -> Tensor:
    """The mean of those [B] that are marked; 0 if none is."""
    return (error * which).sum() / which.sum().clamp(min=1)
