"""Distribution matching distillation in one step. Yin et al. 2023, arXiv:2311.18828."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .. import perceptual
from ..fields import ranged
from ..losses import pseudo_huber
from ..roles import Roles
from ..sampling import Inference, trailing
from .base import Strategy
from .shared import check_ranges, fit_fake, generate, match, renoises


@dataclass
class DMD(Strategy):
    """A one-step student learns two things at once. Its samples of new noise move to where the teacher finds them likelier
    than a fake score does, which keeps learning what the student makes; and from the noise of a teacher pair it has to make
    that pair's picture, so that it leaves no kind of picture out.

    Guidance acts on the teacher alone, in its score as in its pairs; the fake score is never guided.

    Objective: least KL(q_t || p_t) over all times t, q being what the student makes and p the guided teacher's, and least
    distance of the student's samples from where the teacher's ODE takes the same noise.

        x0    = student(z)                    z new noise
        x_t   = alpha_t x0 + sigma_t eps      t ~ U(t_range)
        real  = D_null + w (D_cond - D_null)  of the teacher at x_t, w = guidance
        fake  = D_cond                        of the fake score at x_t
        g     = (fake - real) / mean|x0 - real|   the mean over each sample
        L     = 1/2 mean((x0 - sg(x0 - g))^2)     so dL/dx0 = g / entries of x0
                + regression d(student(z_i), y_i)   pairs (z_i, y_i) of the batch

        huber  d(x, y) = mean(sqrt((x - y)^2 + c^2) - c)   in latents
        lpips  d(x, y) = LPIPS(decode(x), decode(y))

    sg stops the gradient: real, fake and the mean get none. The critic learns by denoising sg(x0), of new noise alone, in every
    iteration: mean((its output - target)^2) in the space fake_loss, at a t ~ U(0.002, 0.998) of its own. On flow, drawn times
    are shifted as the teacher's sampler shifts them.

    When to choose it: for one step without pictures, where some thousands of pairs, each a whole run of the teacher's solver,
    are affordable; they are made once (stepdistill pairs) and serve several runs. DMD2 needs no pairs and takes several steps.
    A sample and iteration costs 3 forwards with a gradient (student 2, critic) and 3 without (teacher 2, fake score 1); lpips
    adds two decodings, one with a gradient, and a VGG network.

    Healthy curves: seen in dmd_tiny_sd (170 iterations).

    - student/matching is how far apart the two scores are, in units of the teacher's own error; it does not fall to 0. It
      started at what guidance alone adds (0.46 at guidance 3), rose to 0.8 within 20 iterations, as the critic learnt to know
      the student, and sank to 0.62.
    - student/regression fell from 0.5 to 0.39 in 60 iterations, and hardly after that: one step cannot follow the ODE of a
      guided teacher. With regression: 1.0 it was at 0.35, and matching higher, at 0.68.
    - critic/denoising rose from 0.19 to 0.25 in 30 iterations, and stayed. It is the error of a task that changes with the
      student, so its level says little.
    - student/grad_norm rose from 0.1 to 0.4 and sank to 0.25, critic/grad_norm sank from 0.15 to 0.08.
    """

    guidance: float = ranged(3.0, low=1, high=1000)  # scale of the teacher, also in its pairs
    t_range: tuple[float, float] = ranged((0.02, 0.98), above=0, below=1)  # times at which the two scores are compared
    regression: float = ranged(0.25, above=0, high=1000)  # weight of the pairs' distance (reported for LPIPS, not confirmed)
    distance: Literal["huber", "lpips"] = "huber"  # of a pair: pseudo-Huber in latents, or LPIPS of decoded pictures
    huber: float = ranged(1e-3, above=0, high=1000)  # constant c of the pseudo-Huber distance
    fake_loss: Literal["eps", "x0", "v", "flow"] | None = None  # space of the critic's error; null: the network's own

    roles = ("student", "fake")
    needs = frozenset({"pairs"})

    @property
    def decodes(self):
        return self.distance == "lpips"

    def check(self):
        yield from check_ranges(self, "t_range")
        if self.distance == "lpips" and not perceptual.installed():
            yield f"distance: lpips needs a package that is not installed; {perceptual.INSTALL}, or set distance to huber"

    def players(self, stage):
        return {"student": ("student",), "critic": ("fake",)}

    def losses(self, roles, batch, draw):
        how = self.inference(roles.schedule)
        x0 = generate(roles, how, batch._replace(noise=draw.normal(batch.noise)), draw, grad=True)[0].x0
        matching = match(roles, x0, batch, draw, self.t_range, self.guidance)
        regression = self.apart(roles, generate(roles, how, batch, draw, grad=True)[0].x0, batch.x0)
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
