"""One-step diffusion models with f-divergence distribution matching. Xu et al. 2025, arXiv:2502.15681."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .. import distributed
from ..batch import Batch, Draw
from ..fields import ranged
from ..losses import distribution_matching, gan_student
from ..roles import Roles
from ..sampling import Inference
from .base import Strategy
from .shared import Head, check_ranges, check_times, discriminate, fit_fake, generate, own_steps, renoises

WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {  # divergence -> h(r) = f''(r) r^2 of the ratio r = p / q, Tab. 1
    "reverse_kl": torch.ones_like,  # f = -log r: DMD2
    "softened_reverse_kl": lambda r: 1 / (r + 1),  # (r + 1) log(1/2 + 1/(2r)): the non-saturating GAN's own
    "js": lambda r: r / (r + 1),  # r log r - (r + 1) log((r + 1) / 2)
    "squared_hellinger": lambda r: r.sqrt() / 4,  # 1 - sqrt(r)
    "forward_kl": lambda r: r,  # r log r: covers modes, with much variance
    "jeffreys": lambda r: r + 1,  # (r - 1) log r
    "neyman": lambda r: 2 / r,  # (1 - r)^2 / r; not in the paper
}


@dataclass
class FDistill(Strategy):
    """DMD2 whose matching is weighted by how much likelier pictures are than the student's samples, so that it descends a
    divergence of one's choice and not the mode-seeking reverse KL alone. A discriminator tells the ratio.

    The ratio is of pictures to samples, the scores are of the guided teacher: with guidance they belong to different targets.
    Ratios are averaged over all processes, but not over the parts of an accumulated batch: keep those large.

    Objective: least D_f = E_q[f(p / q)] over all times t. Its gradient is that of DMD2, sample by sample times h(r) = f''(r)
    r^2.

        x0, x_t, real, fake    as in DMD2
        r    = exp(clamp(mean of l(x_t), log of ratio_range))    l the logits
        r   <- r / average of r in the bin of t, if bins is not null
        h    = sg(h(r) / mean h(r))           the mean over all samples
        g    = h (fake - real) / mean|x0 - real|
        L    = 1/2 mean((x0 - sg(x0 - g))^2) + gan mean softplus(-l(x_t))

        reverse_kl 1    softened_reverse_kl 1/(r+1)    js r/(r+1)    forward_kl r
        squared_hellinger sqrt(r)/4            jeffreys r+1          neyman 2/r

    sg stops the gradient. Guidance acts on the teacher's real alone, as in DMD2. The critic denoises sg(x0) as in DMD2, and its
    discriminator l, which reads a network's features, learns by gan_critic mean(softplus(-l(y_t)) + softplus(l(x_t))), y a
    picture, each noised to a t ~ U(0.002, 0.998) of its own.

    When to choose it: after DMD2, if its student leaves out kinds of pictures that the data has, and there are many pictures
    with captions. js is the safe choice; forward_kl and jeffreys cover more and have more variance; reverse_kl is DMD2 with a
    GAN. It needs a discriminator that knows something: with too few iterations the weights stay near 1, and this is a dearer
    DMD2. A sample and iteration costs what DMD2 costs, and 3 forwards with a gradient for the discriminator. Keep guidance low:
    pictures are not guided, and the ratio is to them.

    Healthy curves: seen in f_distill_tiny_sd (205 iterations), also with gan_critic: 1.

    - student/matching and critic/denoising go as in DMD2: 0.55 to 0.84 within 20 iterations, then down to 0.6; 0.15 to 0.3.
    - student/least_weight and student/most_weight are the smallest and largest h of the batch. They were 0.8 and 1.2, and 0.5
      and 1.3 at most: almost DMD2. A weight far above the others, again and again, means few samples teach: take js, a narrower
      ratio_range, larger batches.
    - student/gan stays near 0.69 (log 2) and critic/gan near 1.39 (2 log 2) while the discriminator knows nothing, as at first.
      After 200 iterations they were at 0.75 and 1.34, and critic/real (the mean logit of pictures) lay above critic/fake (of
      samples) by 0.1 to 0.3, whatever gan_critic: AdamW takes its weight out again, unless it competes with denoising.
    - Sick, but not seen here: a discriminator that has won, critic/gan near 0, real and fake far apart, ratios at the ends of
      ratio_range, so that the weights say nothing any more; lower gan_critic. Otherwise as in DMD2.
    """

    divergence: Literal[*WEIGHTS] = "js"  # the f of D_f = E_q[f(p / q)], p of pictures, q of samples
    ratio_range: tuple[float, float] = ranged((0.1, 20.0), above=0, high=10**6)  # the ratio is clamped to it
    # the ratio is divided by its average in so many bins of time; null: it is not
    bins: int | None = ranged(10, low=1, high=10**4)
    bins_decay: float = ranged(0.0, low=0, below=1)  # memory of those averages; 0: of this batch alone (0.5 for ImageNet)
    steps: int = ranged(4, low=1, high=50)  # evaluations of the student when it is sampled
    times: tuple[float, ...] | None = ranged(None, above=0, high=1)  # their times, from noise down; null: equal steps
    guidance: float = ranged(1.75, low=1, high=1000)  # scale of the teacher
    t_range: tuple[float, float] = ranged((0.02, 0.98), above=0, below=1)  # times at which the two scores are compared
    student_every: int = ranged(5, low=1, high=10**4)  # critic updates for each of the student
    fake_loss: Literal["eps", "x0", "v", "flow"] | None = None  # space of the critic's error; null: the network's own
    gan: float = ranged(1e-3, low=0, high=1000)  # weight of the student's GAN loss; the discriminator is there in any case
    gan_critic: float = ranged(1e-2, above=0, high=1000)  # weight of the discriminator's own loss
    gan_on: Literal["fake", "teacher"] = "fake"  # whose features the discriminator reads; those of fake learn with it
    renoise: bool | None = None  # sample with new noise after each step; null: on DDPM tables yes, on flow no

    roles = ("student", "fake")
    needs = frozenset({"x0"})

    def check(self):
        yield from check_times(self.steps, self.times)
        yield from check_ranges(self, "t_range", "ratio_range")

    def setup(self, roles):
        self.head, self.averages = Head(roles.fake.width), Averages(self.bins or 1)

    def modules(self):
        return {"head": self.head, "averages": self.averages}

    def players(self, stage):
        return {"student": ("student",), "critic": ("fake", "head")}

    def losses(self, roles, batch, draw):
        turn = draw.step % self.student_every == 0
        x0 = generate(roles, self.inference(roles.schedule), batch, draw, grad=turn)[0].x0
        if turn:
            matching, gan, h = self.match(roles, x0, batch, draw)
            logs = {"matching": matching, "gan": gan, "least_weight": h.min(), "most_weight": h.max()}
            yield "student", matching + self.gan * gan, logs
        x0 = x0.detach()
        loss = fit_fake(roles, x0, batch.cond, draw, self.fake_loss)
        yield "critic", loss, {"denoising": loss}
        yield discriminate(self.head, self.gan_on, roles, batch.x0, x0, batch.cond, draw, self.gan_critic)

    def match(self, roles: Roles, x0: Tensor, batch: Batch, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted distribution matching, the GAN loss at the same x_t, and the weights h [B]."""
        u = draw.uniform(*self.t_range)
        t = roles.schedule.warp(u)
        x_t = roles.noise(x0, t, draw.normal(x0))
        logits = self.head(roles[self.gan_on].features(x_t, t, batch.cond)[1])  # [B, L]
        with torch.no_grad():
            real = roles.teacher.guided(x_t, t, batch.cond, batch.null, self.guidance)
            fake = roles.fake(x_t, t, batch.cond)
            h = self.weights(logits, u)
        return distribution_matching(x0, real.x0, fake.x0, h), gan_student(logits), h

    def weights(self, logits: Tensor, u: Tensor) -> Tensor:
        """h of the ratio that the logits [B, L] tell at times u [B], divided by its mean over all processes."""
        r = logits.mean(1).clamp(*map(math.log, self.ratio_range)).exp()
        if self.bins is not None:
            low, high = self.t_range
            r = r / self.averages(((u - low) / (high - low) * self.bins).long().clamp(0, self.bins - 1), r, self.bins_decay)
        h = WEIGHTS[self.divergence](r)
        return h / distributed.mean(h.mean())

    def inference(self, schedule, steps=None):
        hops = own_steps("f-distill", schedule, self.steps, self.times, steps)
        return Inference(hops, renoise=renoises(self.renoise, schedule))


class Averages(nn.Module):
    """Running averages of numbers in bins, over all processes."""

    def __init__(self, bins: int):
        super().__init__()
        self.register_buffer("value", torch.ones(bins))

    @torch.no_grad()
    def forward(self, where: Tensor, x: Tensor, decay: float) -> Tensor:
        """Take numbers x [B] of the bins `where` [B] into account; returns each one's average [B]."""
        zeros = x.new_zeros(len(self.value))
        total, count = distributed.mean(torch.stack([zeros.index_add(0, where, y) for y in (x, torch.ones_like(x))]))
        new = decay * self.value + (1 - decay) * total / count
        self.value.copy_(torch.where(count > 0, new, self.value))
        return self.value[where].to(x)
