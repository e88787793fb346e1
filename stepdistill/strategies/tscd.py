"""Trajectory-segmented consistency distillation. Hyper-SD, Ren et al. 2024, arXiv:2404.13686; TCD, arXiv:2402.19159."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ..batch import Batch, Draw
from ..diffusion import like
from ..fields import ranged
from ..losses import gan_student
from ..roles import Roles
from ..sampling import Inference, trailing
from .base import Strategy
from .dmd2 import DMD2
from .shared import Head, begin_target, discriminate, logits, move_target


@dataclass
class TSCD(Strategy):
    """The teacher's trajectory falls into segments, and the student learns to say from every point where its segment ends:
    first in many segments, where that is almost denoising, then in fewer and fewer, down to one, whose end is the picture. So
    what is hard is learnt from what was easier. Stages can add a discriminator, which tells where the student's step leads
    from where it should lead; it judges no pictures.

    Each segment has one end, not one drawn at random as in CTM and TCD: a network that is not told where to go says one
    vector, and that is exact for one end alone. PCM, arXiv:2405.18407, does so too. Of Hyper-SD itself neither its ends, nor
    its numbers of segments, nor the weights of its losses are confirmed.

    Objective: from a point on the way to a picture, and from the next point that the guided teacher's solver reaches, the
    student's step must lead to the same end of the segment.

        x_t  = alpha_t x0 + sigma_t eps      x0 a picture, t uniform on the grid
        D    = D_null + w (D_cond - D_null)  of the teacher, w ~ U(guidance)
        x_s  = the DDIM (flow: Euler) step of D from t to s, the next point
        F(x, t) = alpha_e x0' + sigma_e eps'    x0', eps' the student's at x, t,
                                                e the end of t's segment
        f    = F(x_t, t)
        y    = sg F(x_s, s), but x_s where s = e
        L    = (1 - mix) mean((f - y)^2) + mix mean softplus(-l(f))

        critic  mean(softplus(-l(y)) + softplus(l(sg f)))    if mix > 0

    sg stops the gradient; y comes of the student itself or, with ema, of its average. l is a discriminator on the teacher's
    features of what it is given, noised on by q(x_r | x_e) to a random r above e. With score there is one stage more: DMD2 in
    one step (see there), at the middle of guidance.

    When to choose it: for one LoRA that serves any number of steps, as LCM does, which is one segment from the start, another
    distance and another way to sample. Or, where segments end with N > 1, for a student of exactly N steps, the easier the
    larger N; DDIM (flow: Euler) samples it. It needs pictures with captions like those it is to make. A student of one segment
    is sampled by TCDScheduler with eta. In theory a perfect one wants all new noise (eta 1), for it was taught no way but to
    the end; after minutes none at all was best (tscd_tiny_sd, 512 pictures: FD 3.8 with eta 0, 4.3 with 0.3, 5.5 with 1). A
    sample and iteration costs 4 forwards, of which 1 has a gradient (teacher 2, target 1, student 1); mix adds 3, of which 1
    has one.

    Healthy curves: seen in tscd_tiny_sd, 400 iterations.

    - student/consistency compares the student with itself, and a stage with fewer segments is harder: each stage has its own
      level. It sank from 0.011 to 0.007 in 200 iterations of 2 segments, jumped to 0.024 as 1 segment began, and stayed between
      0.02 and 0.03, single iterations at 0.08. It tells stability, not quality: judge by the samples.
    - student/grad_norm was 0.02 in the first stage, 0.05 to 0.1 in the second, and never above 1.
    - student/gan and critic/gan, only with mix, stayed at 0.69 (log 2) and 1.39 (2 log 2), critic/real and critic/fake within
      0.01 of each other: in so few iterations the discriminator learnt nothing, and did no harm.
    - student/matching and critic/denoising, only with score, are those of DMD2. (Not seen on pictures yet.)
    """

    segments: tuple[int, ...] = ranged((8, 4, 2, 1), low=1, high=1000)  # of the trajectory in each stage; the last ones stay
    stage_steps: int = ranged(1000, low=1, high=10**8)  # iterations of each stage; the last one lasts until train.steps
    guidance: tuple[float, float] = ranged((3.0, 8.0), low=1, high=1000)  # range of the teacher's scale
    mix: tuple[float, ...] = ranged((0.0, 0.0, 0.05, 0.1), low=0, high=1)  # share of the GAN loss in each stage (not confirmed)
    grid: int = ranged(48, low=1, high=1000)  # solver steps from noise to data; a multiple of the first number of segments
    ema: float | None = ranged(None, low=0, below=1)  # decay of the target network (0.95); null: the student itself
    steps: int = ranged(4, low=1, high=50)  # evaluations of the student; as many as segments, if more than one is kept
    eta: float = ranged(0.0, low=0, high=1)  # new noise after each step, TCD's gamma (there 0.3); on flow 0 or 1
    score: bool = False  # a stage more, until train.steps, of distilling scores into one step, as DMD2 does
    student_every: int = ranged(5, low=1, high=10**4)  # in that stage, critic updates for each of the student

    needs = frozenset({"x0"})

    @property
    def roles(self) -> tuple[str, ...]:
        return ("student", *["target"] * (self.ema is not None), *["fake"] * self.score)

    @property
    def stages(self) -> int:
        return len(self.segments) + self.score

    def check(self):
        if not self.segments:
            yield "segments: [] says nothing; name at least one number, as in [1]"
        for more, fewer in pairwise(self.segments):
            if more <= fewer or more % fewer:
                yield f"segments: {fewer} after {more}; each number must divide the one before it, and be smaller"
        if self.segments and self.grid % self.segments[0]:
            yield f"grid: {self.grid} does not fall into {self.segments[0]} segments; use a multiple"
        if len(self.mix) != len(self.segments):
            yield f"mix: {len(self.mix)} shares for {len(self.segments)} stages; give one for each number of segments"
        if self.guidance[0] > self.guidance[1]:
            yield f"guidance: {list(self.guidance)} is no range; write the smaller scale first"
        if self.score and self.segments[-1:] != (1,):
            yield "score: scores are distilled into one step, which one segment leads up to; let segments end with 1"
        if self.made_for not in (None, self.steps):
            yield f"steps: {self.steps}, but segments and score make a student for {self.made_for}; set steps to that"
        if self.eta and self.made_for is not None:
            yield f"eta: {self.eta:g} is new noise, but a student made for {self.made_for} steps takes none; set eta to 0"

    @property
    def made_for(self) -> int | None:
        """The only number of steps that the student can take; None: it takes any."""
        if self.score:
            return 1
        return self.segments[-1] if self.segments and self.segments[-1] > 1 else None

    def setup(self, roles):
        if any(self.mix):
            self.head = Head(roles.teacher.width)

    def modules(self):
        return {"head": self.head} if any(self.mix) else {}

    def stage(self, step):
        return min(step // self.stage_steps, self.stages - 1)

    def enter(self, roles, stage):
        begin_target(roles)

    def players(self, stage):
        if stage == len(self.segments):
            return {"student": ("student",), "critic": ("fake",)}
        return {"student": ("student",), "critic": ("head",)} if self.mix[stage] else {"student": ("student",)}

    def losses(self, roles, batch, draw):
        stage = self.stage(draw.step)
        if stage == len(self.segments):
            one_step = DMD2(steps=1, guidance=sum(self.guidance) / 2, student_every=self.student_every)
            yield from one_step.losses(roles, batch, draw)
            return
        y, target, end = self.pair(roles, batch, draw, self.segments[stage])
        loss = consistency = F.mse_loss(y, target)
        logs, share = {"consistency": consistency}, self.mix[stage]
        if share:
            logs["gan"] = gan_student(logits(self.head, "teacher", roles, y, batch.cond, draw, end))
            loss = (1 - share) * consistency + share * logs["gan"]
        yield "student", loss, logs
        if share:
            yield discriminate(self.head, "teacher", roles, target, y.detach(), batch.cond, draw, since=end)

    def pair(self, roles: Roles, batch: Batch, draw: Draw, segments: int) -> tuple[Tensor, Tensor, Tensor]:
        """Where the student says that random points' segments end, where it should (no gradient), [B, ...]; that time [B]."""
        x0, w, length = batch.x0, draw.uniform(*self.guidance), self.grid // segments
        times = torch.tensor(roles.schedule.grid(self.grid), dtype=x0.dtype, device=x0.device)
        n = draw.integer(1, self.grid + 1)
        t, s, end = times[n], times[n - 1], times[(n - 1) // length * length]  # [B], end <= s < t
        x_t = roles.noise(x0, t, batch.noise)
        with torch.no_grad():
            x_s = roles.move(roles.teacher.guided(x_t, t, batch.cond, batch.null, w), s)  # one step down the PF-ODE
            target = roles.move(roles.get("target", roles.student)(x_s, s, batch.cond), end)
            target = torch.where(like(s, x_s) == like(end, x_s), x_s, target)  # F is that anyway, but where sigma is 0
        return roles.move(roles.student(x_t, t, batch.cond), end), target, end

    def after_step(self, roles, moved):
        move_target(roles, moved, self.ema)

    def inference(self, schedule, steps=None):
        if self.made_for is None:
            return Inference(trailing(schedule.grid(steps or self.steps)), eta=self.eta)
        if steps not in (None, self.steps):
            raise ValueError(f"a TSCD student made for {self.steps} steps cannot take {steps}; set steps to {self.steps}")
        return Inference(trailing(schedule.grid(self.steps)), renoise=False)
