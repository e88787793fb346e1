"""Improved distribution matching distillation. Yin et al. 2024, arXiv:2405.14867."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..batch import Batch, Draw
from ..fields import ranged
from ..losses import distribution_matching, gan_student, surrogate
from ..roles import Roles
from ..sampling import Inference
from .base import Strategy
from .shared import Head, check_ranges, check_times, discriminate, fit_fake, generate, logits, own_steps, renoises


@dataclass
class DMD2(Strategy):
    """The student's own samples are moved to where the teacher finds them likelier than a critic, the fake score, which keeps
    learning what the student makes. Data-free, unless gan adds a discriminator on real pictures.

    Guidance acts on the teacher alone; the critic is never guided. Decoupled DMD (decoupled: true) takes what guidance adds at
    times less noisy than the student's own step, and matches at all times: its authors find that guidance is what drives a
    few-step student, and matching what keeps it in place.

    Objective: least KL(q_t || p_t) over all times t, q being what the student makes and p the guided teacher's.

        x0    = the student's after k of its own steps from noise, k random
        x_t   = alpha_t x0 + sigma_t eps      t ~ U(t_range)
        real  = D_null + w (D_cond - D_null)  of the teacher at x_t, w = guidance
        fake  = D_cond                        of the fake score at x_t
        g     = (fake - real) / mean|x0 - real|   the mean over each sample
        L     = 1/2 mean((x0 - sg(x0 - g))^2)     so dL/dx0 = g / entries of x0

    sg stops the gradient: real, fake and the mean get none, and x0 hands it to its last step only. The critic learns by
    denoising sg(x0): mean((its output - target)^2) in the space fake_loss, at a t ~ U(0.002, 0.998) of its own. On flow, drawn
    times are shifted as the teacher's sampler shifts them.

        decoupled  real = D_cond(x_t) + augment (w - 1) (D_cond - D_null)(x_s)
                   s ~ U(t_range) times the time of the student's step
        normalize: false   g = fake - real
        gan > 0    student + gan mean softplus(-l(x_t))
                   critic + gan_critic mean(softplus(-l(y_t)) + softplus(l(x_t)))

    x_s has noise of its own, and with augment_range s is drawn from that alone. l is the discriminator on a network's features,
    y a picture, each noised to a t ~ U(0.002, 0.998) of its own.

    When to choose it: try it first, for 1 to 4 steps: its pictures are sharp, and it needs prompts alone. The price is a second
    learner that must keep up with the student, and fewer kinds of pictures: the reverse KL would rather leave some out than
    make unlikely ones (f_distill weighs against that, with pictures). A sample and iteration costs 2 forwards with a gradient
    (student, critic), 3 without (teacher 2, fake score 1), and (steps - 1) / 2 of rollout; where the student does not move,
    only the rollout and two. decoupled adds 1, gan 3 with a gradient. Each of the steps has to be learnt, so choose few;
    sampling in a divisor of them works too. decoupled is for guidance well above 1, and was better than plain DMD2 on tiny-sd
    in two steps (docs/strategies.md); gan, with pictures, corrects what the teacher itself gets wrong.

    Healthy curves: seen in dmd2_tiny_sd (1,400 iterations) and dmd2_tiny_sd3 (1,000), and, what is sick, in short runs of
    tiny-sd.

    - student/matching is how far apart the two scores are, in units of the teacher's own error; it does not fall to 0. It
      starts at what guidance alone adds (0.45 at guidance 3, 0 at 1), rises to 0.8 within 20 to 60 iterations, as the critic
      learns to know the student, and then sinks slowly, to 0.53 on tiny-sd and 0.68 on tiny-sd3, under noise of a seventh of
      its value. decoupled goes the same way, lower: 0.38, 0.7, and 0.4 after 45 iterations.
    - critic/denoising rises in the same iterations (0.15 to 0.3 on tiny-sd, 0.3 to 0.5 on tiny-sd3), and then stays or sinks a
      little. It is the error of a task that changes with the student, so its level says little.
    - student/grad_norm goes from 0.1 to 0.2 or 0.3, critic/grad_norm lies between 0.1 and 0.4; about 1 in 100 is above 1.
    - student/gan and critic/gan, only with gan, are 0.69 (log 2) and 1.39 (2 log 2) where the discriminator knows nothing;
      critic/real and critic/fake are its mean logits of pictures and of samples. Pictures should lie a little higher. If the
      two part for good, critic/gan near 0 and student/gan growing, the discriminator has won: lower gan_critic. (Not measured
      here.)
    - Sick: a critic that is too slow. With optim.critic_lr a thousandth of the student's, matching stayed at its first value
      for 45 iterations, without the rise; denoising climbed as ever, and the samples showed nothing yet. Raise optim.critic_lr
      or student_every.
    - Sick: a student that is too fast. At twenty times the rate denoising jumped from 0.15 to 0.6 within 10 iterations,
      matching fell to 0.4 before it rose, and the samples got patterns and glaring colours. Lower optim.student_lr.
    """

    steps: int = ranged(4, low=1, high=50)  # evaluations of the student when it is sampled
    times: tuple[float, ...] | None = ranged(None, above=0, high=1)  # their times, from noise down; null: equal steps
    guidance: float = ranged(8.0, low=1, high=1000)  # scale of the teacher
    t_range: tuple[float, float] = ranged((0.02, 0.98), above=0, below=1)  # times at which the two scores are compared
    decoupled: bool = False  # guide at times of their own: Decoupled DMD, arXiv:2511.22677
    augment_range: tuple[float, float] | None = ranged(None, above=0, below=1)  # those times; null: t_range x student's own
    augment: float = ranged(1.0, low=0, high=1000)  # weight of what guidance adds there (the paper's is not confirmed)
    normalize: bool = True  # divide by each sample's mean |x0 - real|; false: do not, as in Decoupled DMD's pseudo-code
    student_every: int = ranged(5, low=1, high=10**4)  # critic updates for each of the student: two time-scales, Sec. 4.2
    alternate: bool = False  # no critic update when the student moves; false: both, on the same samples
    fake_loss: Literal["eps", "x0", "v", "flow"] | None = None  # space of the critic's error; null: the network's own
    # weight of the student's GAN loss, Sec. 4.3 (5e-3 for SDXL); 0: no discriminator
    gan: float = ranged(0.0, low=0, high=1000)
    gan_critic: float = ranged(1e-2, above=0, high=1000)  # weight of the discriminator's own loss
    gan_on: Literal["fake", "teacher"] = "fake"  # whose features the discriminator reads; those of fake learn with it
    renoise: bool | None = None  # sample with new noise after each step; null: on DDPM tables yes, on flow no

    roles = ("student", "fake")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"x0"}) if self.gan else frozenset()

    def check(self):
        yield from check_times(self.steps, self.times)
        yield from check_ranges(self, "t_range", "augment_range")
        if self.augment_range and not self.decoupled:
            yield "augment_range: guidance has times of its own only with decoupled: true; set that, or augment_range to null"
        if self.augment != 1 and not self.decoupled:
            yield "augment: guidance has a weight of its own only with decoupled: true; set that, or augment to 1"
        if self.decoupled and self.guidance == 1:
            yield "decoupled: guidance 1 adds nothing that could be decoupled; set guidance above 1"
        if self.alternate and self.student_every < 2:
            yield "alternate: the critic never moves with student_every: 1; set student_every to 2 or more"

    def setup(self, roles):
        if self.gan:
            self.head = Head(roles.fake.width)

    def modules(self):
        return {"head": self.head} if self.gan else {}

    def players(self, stage):
        return {"student": ("student",), "critic": ("fake", "head") if self.gan else ("fake",)}

    def losses(self, roles, batch, draw):
        turn = draw.step % self.student_every == 0
        p, time = generate(roles, self.inference(roles.schedule), batch, draw, grad=turn)
        x0 = p.x0
        if turn:
            loss = matching = self.match(roles, x0, time, batch, draw)
            logs = {"matching": matching}
            if self.gan:
                logs["gan"] = gan_student(logits(self.head, self.gan_on, roles, x0, batch.cond, draw))
                loss = matching + self.gan * logs["gan"]
            yield "student", loss, logs
        if turn and self.alternate:
            return
        x0 = x0.detach()
        loss = fit_fake(roles, x0, batch.cond, draw, self.fake_loss)
        yield "critic", loss, {"denoising": loss}
        if self.gan:
            yield discriminate(self.head, self.gan_on, roles, batch.x0, x0, batch.cond, draw, self.gan_critic)

    def match(self, roles: Roles, x0: Tensor, time: float, batch: Batch, draw: Draw) -> Tensor:
        """Distribution matching at one random time for each sample, Eq. 3; time: of the student's evaluation."""
        t = roles.schedule.warp(draw.uniform(*self.t_range))
        x_t = roles.noise(x0, t, draw.normal(x0))
        with torch.no_grad():
            fake = roles.fake(x_t, t, batch.cond).x0
            if self.decoupled:
                real = roles.teacher(x_t, t, batch.cond).x0 + self.augmentation(roles, x0, time, batch, draw)
            else:
                real = roles.teacher.guided(x_t, t, batch.cond, batch.null, self.guidance).x0
        return distribution_matching(x0, real, fake) if self.normalize else surrogate(x0, fake - real)

    def augmentation(self, roles: Roles, x0: Tensor, time: float, batch: Batch, draw: Draw) -> Tensor:
        """What guidance adds to a clean prediction, [B, ...], at times of its own. Decoupled DMD, arXiv:2511.22677."""
        s = roles.schedule.warp(draw.uniform(*(self.augment_range or self.t_range)))
        s = s if self.augment_range else s * time
        cond, null = roles.teacher.pair(roles.noise(x0, s, draw.normal(x0)), s, batch.cond, batch.null)
        return self.augment * (self.guidance - 1) * (cond.x0 - null.x0)

    def inference(self, schedule, steps=None):
        hops = own_steps("DMD2", schedule, self.steps, self.times, steps)
        return Inference(hops, renoise=renoises(self.renoise, schedule))
