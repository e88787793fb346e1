"""Score-regularized continuous-time consistency. rCM, Zheng et al. 2025, arXiv:2510.08431."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..batch import Batch, Draw
from ..fields import ranged
from ..roles import Roles
from ..sampling import Inference
from .base import Strategy
from .shared import any_steps, check_ranges, check_times, fit_fake, match
from .trigflow import check_proposal, consistency, points


@dataclass
class RCM(Strategy):
    """sCM's consistency, and beside it, on samples of the student's own, the score difference of DMD. Consistency covers all
    that the teacher makes, but lets errors gather over a trajectory; the score difference looks at samples and sharpens them,
    but would rather leave some kinds out. Each mends the other's fault.

    Objective: sCM's loss (stepdistill explain scm; every angle weighs the same), and KL(q_t || p_t) over all times t, q being
    what the student makes and p the guided teacher's.

        x, theta, v, g, e    as in sCM
        L    = mean(e)                       first part
        x0   = the student's, from noise, after 1 to `rollout` steps at times
               that fall at random from 1
        x_t  = alpha_t x0 + sigma_t eps      t ~ U(t_range)
        real = D_null + w (D_cond - D_null)  of the teacher at x_t, w = guidance
        fake = D_cond                        of the fake score at x_t
        d    = (fake - real) / mean|x0 - real|   the mean over each sample
        L    = matching 1/2 mean((x0 - sg(x0 - d))^2)          second part

        critic  mean |D_fake(x_t) - sg(x0)|^2 / sin^2(theta_t)

    sg stops the gradient, which of a rollout the last step alone has. For the first warmup iterations there is the first part
    alone, while its r rises to 1; after that student and critic alternate, student_every - 1 of the critic for each of the
    student. Guidance acts in v and in real. On flow, drawn times are shifted as the teacher's sampler shifts them. The paper's
    0.01 stands beside sums over a sample, and a tangent of length 1; here all are means, and matching is beside them. Its
    released code leaves the derivative's share r at 1 while it warms up; here r is what sCM's paper says.

    When to choose it: for 1 to 4 steps of large models, where DMD2 loses variety: pictures (they may be the teacher's own) or
    trajectories keep it. Two objectives cost more than one: a student's iteration 2 forwards with a gradient and 7 without,
    beside the rollout of (rollout - 1) / 2; a critic's 1 with a gradient beside the rollout's (rollout + 1) / 2.

    Healthy curves: seen in rcm_tiny_sd (300 iterations, of which 50 of warm-up), and with another weight in its place.

    - student/tangent and student/consistency are those of sCM. The tangent rose from 0.15 to 0.4 in the warm-up, and slowly on
      to 0.68: the two parts do not want quite the same. Consistency went from 0.3 to 0.73.
    - student/matching is how far apart the two scores are, in units of the teacher's own error. It began at 0.4, what guidance
      alone adds, rose to 0.66 within ten iterations, as the critic learnt, and sank to 0.48.
    - critic/denoising rose from 0.2 to 0.38, and stayed. It is the error of a task that changes with the student.
    - student/grad_norm was 0.2 to 0.4 in the warm-up, and 1 to 1.5 after it (most of it is matching's, and clipped);
      critic/grad_norm 0.1.
    - Sick: a tangent that grows while matching sinks no more. With matching: 1.0 samples were best after half of the training
      (FD 7.3, then 13, over 512 pictures): raise matching, or widen difference.
    """

    steps: int = ranged(4, low=1, high=50)  # evaluations of the student when it is sampled
    times: tuple[float, ...] | None = ranged(None, above=0, high=1)  # their times, from noise down; null: equal steps
    guidance: float = ranged(5.0, low=1, high=1000)  # scale of the teacher, in both terms
    # points of the teacher's own trajectories for each prompt; null: of pictures
    trajectory: int | None = ranged(None, low=1, high=1000)
    # mean and standard deviation of log tan theta, of the consistency's angles
    proposal: tuple[float, float] = ranged((0.7, 1.6), low=-20, high=20)
    difference: float | None = ranged(0.03, above=0, below=0.5)  # angle of central differences; null: the exact derivative
    tangent: float = ranged(0.1, above=0, high=1000)  # constant c of the tangent's normalization
    # iterations of consistency alone, in which the share r of the derivative rises to 1
    warmup: int = ranged(1000, low=0, high=10**8)
    matching: float = ranged(6.0, above=0, high=10**6)  # weight of the score difference (the paper's 0.01 is to sums, above)
    rollout: int = ranged(4, low=1, high=50)  # at most so many random steps make the samples that are matched
    t_range: tuple[float, float] = ranged((0.02, 0.98), above=0, below=1)  # times of rollouts, and of the two scores
    student_every: int = ranged(5, low=1, high=10**4)  # of so many iterations one moves the student, and the others the critic
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
            at = points(roles, batch, draw, self.guidance, self.proposal, self.trajectory)
            share = draw.step / self.warmup if warm else 1.0
            error, size = consistency(roles, at, share, self.tangent, self.difference)
            yield "student", error.mean(), {"consistency": error.mean(), "tangent": size.mean()}
            if not warm:
                x0 = self.generate(roles, batch, draw, grad=True)
                loss = match(roles, x0, batch, draw, self.t_range, self.guidance)
                yield "student", self.matching * loss, {"matching": loss}
        else:
            x0 = self.generate(roles, batch, draw, grad=False)
            loss = fit_fake(roles, x0, batch.cond, draw, "trig")
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

    def inference(self, schedule, steps=None):
        return Inference(any_steps("rCM", schedule, self.steps, self.times, steps), renoise=self.renoise)
