"""Rectified flow from teacher pairs. Liu et al. 2022, arXiv:2209.03003; rf++, Lee et al. 2024, arXiv:2405.20320."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .. import perceptual
from ..diffusion import Prediction, mix
from ..fields import ranged
from ..losses import denoising, huber_of_samples
from ..roles import Roles
from ..sampling import Inference, trailing
from ..schedules import Schedule
from .base import Strategy


@dataclass
class Reflow(Strategy):
    """The student learns straight ways from the noise of a teacher pair to what the teacher's solver makes of it, at one
    velocity all along. Where ways are straight, a single step goes all of it. Nothing learns against the student, and the
    teacher, which made the pairs, is not asked again. With reflow_steps it is distilled after that: it sees noise alone.

    Networks keep their parameterization and their schedule. At matched signal-to-noise ratio a DDIM step is the Euler step of
    rectified flow, so stock DDIM serves a student with a DDPM table, and the stock Euler scheduler one of flow.

    Objective: least error of the velocity along the chord of every pair (z, x0).

        eps   = (z - alpha_1 x0) / sigma_1    on flow z; on tables too, x_1 is z
        x_t   = alpha_t x0 + sigma_t eps      tau = sigma_t / (alpha_t + sigma_t)
        tau   = 1/2 + asinh((2 u - 1) sinh(a/2)) / a    u ~ U(0, 1), a = u_shape
        e     = flow(x_t, t) - (eps - x0)

        l2           L = mean(e^2)
        huber        L = H = (sqrt(|e|^2 + c^2) - c) / d   d entries, c = huber d
        lpips_huber  L = (1 - tau) H + LPIPS(decode(x0 at x_t), decode(x0))
                     divide_lpips: LPIPS / tau

    tau is the time of rectified flow; what a table has of it is stretched to (0, 1]. Its density is proportional to e^(a tau) +
    e^(a (1 - tau)): most at both ends (rf++); a = 0 is uniform. From iteration reflow_steps on tau is 1: x_t is z, and e is, up
    to a constant, the error of the sample of one step. Guidance acts in the pairs alone, and is distilled in.

    Rectified again (k-rectified flow) the student becomes the teacher: stepdistill export RUN --formats fused writes a whole
    pipeline, whose folder is the model.source of a second recipe, with guidance 1. InstaFlow, arXiv:2309.06380, distils pairs
    of the rectified student: that is such a recipe with reflow_steps 0. On flow the folder does not know the teacher's shift,
    which straight ways do not need.

    When to choose it: for one or two steps without pictures and without a second learner, where some thousands of pairs are
    affordable. It is the cheapest strategy, one forward with a gradient a sample and iteration (lpips_huber adds two decodings,
    one with a gradient, and a VGG network), and the student keeps what the teacher makes of the same noise. Where one step
    cannot tell which way a pair goes, it averages; against that DMD adds a matching of distributions to the same pairs. On
    tiny-sd one step was best distilled, and two gained from that as well; without it, each further step was a gain.

    Healthy curves: seen in reflow_tiny_sd (800 iterations), with its distance huber, which in flow is about (|e| - c) / d: the
    larger the samples, the smaller it is.

    - student/flow fell little while ways were straightened, from 0.015 to 0.013 in 200 iterations, under noise of a quarter of
      its value. As distillation began it rose to 0.021, since tau = 1 is the hardest time, and fell to 0.0148 by the end. It
      does not reach 0: one step of a network cannot follow every pair.
    - student/lpips, only with lpips_huber, is the distance of decoded pictures. (Not measured here.)
    - student/grad_norm lay at 0.005, in distillation at 0.012 with single peaks up to 0.17.
    """

    steps: int = ranged(1, low=1, high=50)  # evaluations of the student when it is sampled
    guidance: float = ranged(6.0, low=1, high=1000)  # scale of the teacher in its pairs, unless pairs.guidance says another
    # a of the density e^(a tau) + e^(a (1 - tau)) of drawn times, as in rf++; 0: uniform
    u_shape: float = ranged(4.0, low=0, high=100)
    distance: Literal["l2", "huber", "lpips_huber"] = "huber"  # what is made least, see the objective
    huber: float = ranged(5.4e-4, above=0, high=1000)  # constant of the pseudo-Huber distance, for each entry of a sample
    divide_lpips: bool = False  # weigh LPIPS by 1 / tau
    # iterations, after which it is distilled to one step; null: it never is
    reflow_steps: int | None = ranged(None, low=0, high=10**8)

    needs = frozenset({"pairs"})

    @property
    def decodes(self):
        return self.distance == "lpips_huber"

    @property
    def stages(self) -> int:
        return 1 if self.reflow_steps is None else 2

    def check(self):
        if self.distance == "lpips_huber" and not perceptual.installed():
            yield f"distance: lpips_huber needs a package that is not installed; {perceptual.INSTALL}, or set distance to huber"
        if self.divide_lpips and self.distance != "lpips_huber":
            yield "divide_lpips: there is no LPIPS to divide; set distance to lpips_huber, or this to false"

    def stage(self, step):
        return int(self.reflow_steps is not None and step >= self.reflow_steps)

    def losses(self, roles, batch, draw):
        x0, tau = batch.x0, self.drawn(1 - draw.uniform())  # in (0, 1]
        if self.stage(draw.step):
            tau = torch.ones_like(tau)  # there the flow misses as much as the sample of one step does
        t = along(roles.schedule, tau).to(x0.dtype)
        alpha, sigma = roles.schedule.alpha_sigma(torch.ones_like(t))
        eps = mix(batch.noise, x0, 1 / sigma, -alpha / sigma)  # with it the chord begins in the noise itself
        p = roles.student(roles.noise(x0, t, eps), t, batch.cond)
        logs = self.apart(roles, p, roles.denoising_target(x0, t, eps), tau)
        yield "student", sum(logs.values()), logs

    def drawn(self, u: Tensor) -> Tensor:
        """Shares tau [B] of the chord from uniform numbers u [B], both in [0, 1]: the law's inverse distribution function."""
        a, u = self.u_shape, u.double()
        return 0.5 + torch.asinh((2 * u - 1) * math.sinh(a / 2)) / a if a else u

    def apart(self, roles: Roles, p: Prediction, target: Prediction, tau: Tensor) -> dict[str, Tensor]:
        """The terms of the loss at shares tau [B] of the chord."""
        if self.distance == "l2":
            return {"flow": denoising(p, target, "flow")}
        if self.distance == "huber":
            return {"flow": huber_of_samples(p.flow, target.flow, self.huber)}
        with torch.no_grad():
            end = roles.decode(target.x0)
        lpips = perceptual.lpips(roles.decode(p.x0), end, 1 / tau if self.divide_lpips else None)
        return {"flow": huber_of_samples(p.flow, target.flow, self.huber, 1 - tau), "lpips": lpips}

    def inference(self, schedule, steps=None):
        return Inference(trailing(schedule.grid(steps or self.steps)), renoise=False)


def along(schedule: Schedule, tau: Tensor) -> Tensor:
    """Times [B] at shares tau [B] of a schedule's chord, from its clean end (0) to noise (1): sigma / (alpha + sigma), which
    is the time of rectified flow, is affine in tau."""
    alpha, sigma = schedule.alpha_sigma(torch.tensor([0.0, 1.0], dtype=tau.dtype, device=tau.device))
    clean, noise = sigma / (alpha + sigma)
    at = clean + (noise - clean) * tau
    return schedule.time(torch.atan2(at, 1 - at))
