"""Phased distribution matching distillation. Fan et al. 2025, arXiv:2510.27684 (v3)."""

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
    """The steps fall into phases, each with a student of its own: the first takes noise to an intermediate noise level s, the
    next one goes on from there. Phases are trained one after the other, earlier ones frozen, and a phase matches the teacher
    above its s alone, so that what is settled early, layout and motion, is not bent by what is seen in clean samples.

    The students take turns when they are sampled: an export holds a LoRA for each, and says when to change over.

    Objective: least KL(q_t || p_t) over times t above s, q being what phase k makes at s = t_k and p the guided teacher's.

        x_s   = phases 1 to k - 1, then phase k to one of its steps, k's own
                prediction there moved straight to s       s = 0 in the last
        x_t   = a x_s + b eps              q(x_t | x_s), t between s and noise
        real  = D_null + w (D_cond - D_null)  of the teacher at x_t, w = guidance
        fake  = D_cond                        of the fake score at x_t
        g     = a (score of fake - score of real)                          kl
              = (fake - real) / mean|x0 - real|                           dmd
        L     = 1/2 mean((x_s - sg(x_s - g))^2)

    x0 is the prediction that x_s was moved from; sg stops the gradient, which only the step that was left has. t is uniform
    before the shift of the schedule, in the shares t_range of what lies above s. In the last phase dmd is DMD2. The critic,
    begun anew as the teacher in each phase, learns from sg(x_s) alone, with t between s and noise:

        L_fake = mean(min(1, clamp b^2) (its output - target)^2)
        target = eps  (sigma_t / b) eps
                 x0   x_s / alpha_s - alpha_t sigma_s^2 / (alpha_s^2 b) eps

    whose expectation given x_t is the score of all such x_t, though no clean sample was seen (Eq. 11, 12); clamp null weighs
    all alike. Without it the paper's own space, flow, has targets that grow like 1 / (1 - s): eps has not.

    When to choose it: for 4 steps or more of a large model, above all of videos, where few-step students of DMD2 lose variety
    and motion; or where the teacher is two experts anyway, as Wan 2.2 (let times begin a phase below their boundary, and each
    student trains and wears one of them). It needs prompts alone. A sample and iteration costs what DMD2's does, but rollouts
    get longer, each phase needs iterations of its own, and a critic has to be found anew. One or two steps are DMD2's.

    Healthy curves: seen in phased_dmd_tiny_sd, 130 iterations a phase.

    - student/matching is half the mean square of g, so its level belongs to a phase: with kl it lay at 0.01 to 0.02 in the
      first phase and at 0.05 to 0.3 in the second, whose times reach down to small t, where scores are large.
    - critic/denoising is heavy-tailed wherever samples are not clean: targets grow like 1 / b as t nears s. In the first phase
      it jumped between 0.3 and 2.3 without a trend (clamp tames that), in the second it stayed at 0.04 to 0.1.
    - student/grad_norm was 0.01 to 0.05 in the first phase and up to 0.12 in the second, critic/grad_norm 0.01 to 0.07: nothing
      was clipped.
    - Sick: as in DMD2. Look at the grid as a phase ends: what it makes is what all later phases build upon, and never mended.
    """

    steps: int = ranged(4, low=2, high=50)  # evaluations of the students when they are sampled
    phases: int = ranged(2, low=1, high=50)  # with as many of the steps each
    phase_steps: int = ranged(1000, low=1, high=10**8)  # iterations of each phase; the last one lasts until train.steps
    times: tuple[float, ...] | None = ranged(None, above=0, high=1)  # of the steps, from noise down; null: equal steps
    guidance: float = ranged(4.0, low=1, high=1000)  # scale of the teacher
    t_range: tuple[float, float] = ranged((0.02, 0.98), above=0, below=1)  # of the matching's times, as shares of s to 1
    weight: Literal["kl", "dmd"] = "kl"  # of a time: the KL gradient itself, as in the paper; or DMD's normalized difference
    student_every: int = ranged(5, low=1, high=10**4)  # critic updates for each of the student
    fake_loss: Literal["eps", "x0", "v", "flow"] = "eps"  # space of the critic's error; the paper's is flow
    # c in the weight min(1, c sigma^2) of that error, Eq. 13 (10); null: 1
    clamp: float | None = ranged(None, above=0, high=10**6)
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
