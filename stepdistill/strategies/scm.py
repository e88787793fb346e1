"""Continuous-time consistency distillation. sCM, Lu and Song 2024, arXiv:2410.11081."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..diffusion import like
from ..fields import ranged
from ..roles import Roles
from ..sampling import Inference
from .base import Strategy
from .shared import INSIDE, any_steps, check_times
from .trigflow import Points, angle, check_proposal, consistency, points, predicted, turned


@dataclass
class SCM(Strategy):
    """The student learns to say from every point of the teacher's trajectory where that trajectory ends, as in LCM, but in
    continuous time: no solver step is taken, so there is no solver's error.

    Any teacher serves, in TrigFlow's coordinates: the angle theta = atan2(sigma_t, alpha_t) is the time, and x = x_t /
    |(alpha_t, sigma_t)|. With velocity data no teacher is needed (consistency training), and with trajectory no pictures (TBCM,
    arXiv:2511.20410).

    Objective: f(x, theta) = cos(theta) x - sin(theta) F, the student's clean prediction, shall not change along a trajectory.

        x    = cos(theta) x0 + sin(theta) eps    log tan theta ~ N(proposal)
        v    = dx/dtheta = cos(theta) eps - sin(theta) x0    as the guided
               teacher predicts them; with velocity data, the picture's own
        g    = -cos^2(theta) (F - v)
               - r cos(theta) sin(theta) (x + dF/dtheta)     sg all of it
        r    = min(1, iteration / warmup)
        e    = mean (F - sg(F + g / (|g| + c)))^2   over each sample, c tangent
        L    = mean(exp(-w(theta)) e / tan(theta) + w(theta))     adaptive
             = mean(e)                                            otherwise

        trajectory  x and v where the guided teacher comes by on its way
                    from noise, `trajectory` points of each
        intervals   Delta = pi/2 over their number, y = x - Delta v (turned)
                    L = mean((sqrt(|f(x) - sg f(y)|^2 + huber^2) - huber)
                    / Delta), y itself where it is clean

    With r = 1, g is cos(theta) df/dtheta. dF/dtheta is the whole derivative, along the trajectory; |.| is the root mean square
    over a sample, so c means the same for samples of any size; sg stops the gradient; w is a small network of its own. Guidance
    acts in v alone, and is distilled in.

    The exact derivative (difference: null) is what the paper takes. Networks that hear times as 0 to 1000 have fine waves in
    time that training never touched, and the exact derivative is theirs: on tiny-sd at noise it had more than twice the size
    of the difference over 0.03, and training diverged. Differences average over such waves, and cost 2 forwards in place of
    one with tangents.

    When to choose it: for 1 or 2 steps, from pictures or the teacher's own trajectories, without a second learner. It keeps
    what the teacher makes of a noise, and so its variety, as LCM does. rCM adds a score difference, which sharpens. A sample
    and iteration costs 1 forward with a gradient and 4 without (teacher 2, student 2); a point of a trajectory the same, and
    each trajectory 2 more.

    Healthy curves: seen in scm_tiny_sd (400 iterations), and, what is sick, with the exact derivative in its place.

    - student/tangent is |g|: how fast what the student says still changes along a trajectory. From 0.13 it rose with r to 0.37
      in the 100 iterations of warm-up, and then stayed at 0.4, under noise of half its value. It does not fall to 0.
    - student/consistency is e, and so (|g| / (|g| + c))^2: what the tangent is after normalization. It went from 0.3 to 0.55
      and cannot be above 1. In discrete time there is no tangent, and it is the distance.
    - student/grad_norm began at 2 to 6, which optim.clip cuts: with adaptive, angles near clean pictures weigh most before w
      knows them. It was below 1 after 120 iterations.
    - Sick: a tangent that grows for good. With difference: null it was at 0.4 after 75 iterations, 1.2 after 150 and 1.7 after
      190, consistency at 0.8, and the samples were lost (FD 31, then 102, over 512 pictures): take differences, or a wider one.
    """

    steps: int = ranged(2, low=1, high=50)  # evaluations of the student when it is sampled
    times: tuple[float, ...] | None = ranged(None, above=0, high=1)  # their times, from noise down; null: equal steps
    guidance: float = ranged(5.0, low=1, high=1000)  # scale of the teacher
    velocity: Literal["teacher", "data"] = "teacher"  # dx/dtheta: distillation, or training on pictures without a teacher
    # points of the teacher's own trajectories for each prompt; null: of pictures
    trajectory: int | None = ranged(None, low=1, high=1000)
    # mean and standard deviation of log tan theta (rCM's; sCM's is (-0.3, 1.4))
    proposal: tuple[float, float] = ranged((0.7, 1.6), low=-20, high=20)
    difference: float | None = ranged(0.03, above=0, below=0.5)  # angle of central differences; null: the exact derivative
    tangent: float = ranged(0.1, above=0, high=1000)  # constant c of the tangent's normalization
    warmup: int = ranged(1000, low=0, high=10**8)  # iterations in which the share r of the derivative rises to 1
    adaptive: bool = True  # weigh angles by the error that is learnt for them, Sec. 4.2; false: all alike
    # discrete time as in iCT: first and last number; null: continuous
    intervals: tuple[int, int] | None = ranged(None, low=2, high=10**5)
    double_every: int = ranged(100, low=1, high=10**8)  # iterations after which that number doubles
    huber: float = ranged(5.4e-4, above=0, high=1000)  # constant c of the pseudo-Huber distance in discrete time
    renoise: bool = True  # new noise after each step of sampling; false: the deterministic step

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"x0"}) if self.trajectory is None else frozenset()

    def check(self):
        yield from check_times(self.steps, self.times)
        if self.velocity == "data" and self.trajectory is not None:
            yield "trajectory: it is the teacher's own, and velocity data asks for none; set trajectory to null"
        yield from check_proposal(self.proposal)
        if self.intervals is not None and self.intervals[0] > self.intervals[1]:
            yield f"intervals: {list(self.intervals)} do not grow; write the smaller number first"

    def setup(self, roles):
        if self.adaptive:
            self.errors = Errors()

    def modules(self):
        return {"errors": self.errors} if self.adaptive else {}

    def players(self, stage):
        return {"student": ("student", "errors") if self.adaptive else ("student",)}

    def losses(self, roles, batch, draw):
        scale = self.guidance if self.velocity == "teacher" else None
        at = points(roles, batch, draw, scale, self.proposal, self.trajectory)
        if self.intervals is None:
            share = min(1.0, draw.step / self.warmup) if self.warmup else 1.0
            error, size = consistency(roles, at, share, self.tangent, self.difference)
            logs = {"consistency": error.mean(), "tangent": size.mean()}
        else:
            error = self.jump(roles, at, draw.step)
            logs = {"consistency": error.mean()}
        loss = self.errors(at.theta, error) if self.adaptive else error
        yield "student", loss.mean(), logs

    def jump(self, roles: Roles, at: Points, step: int) -> Tensor:
        """Pseudo-Huber distance [n] of clean predictions an interval apart, over the interval. iCT, arXiv:2310.14189."""
        least, most = (angle(roles.schedule, t, at.theta) for t in (INSIDE[0], 1.0))
        first, last = self.intervals
        below = at.theta - most / min(first * 2 ** (step // self.double_every), last)
        end = below < least  # the trajectory ends within the interval
        below = torch.where(end, 0.0, below)
        with torch.no_grad():
            x = turned(at.x, at.velocity, below - at.theta)
            lower = at._replace(x=x, theta=below.clamp(min=least))
            target = predicted(roles.student, roles.schedule, lower).x0
            target = torch.where(like(end, x) > 0, x, target)
        square = (predicted(roles.student, roles.schedule, at).x0 - target).square().flatten(1).mean(1)
        return ((square + self.huber**2).sqrt() - self.huber) / (at.theta - below)

    def inference(self, schedule, steps=None):
        return Inference(any_steps("sCM", schedule, self.steps, self.times, steps), renoise=self.renoise)


class Errors(nn.Module):
    """The logarithm of the error that is usual at an angle, which weighs errors: the w of arXiv:2410.11081, Eq. 8."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, 32), nn.SiLU(), nn.Linear(32, 1))
        nn.init.zeros_(self.layers[-1].weight)

    def forward(self, theta: Tensor, error: Tensor) -> Tensor:
        """The weighted loss [n] of errors [n] at angles theta [n]: exp(-w) error / tan(theta) + w."""
        tan = theta.sin() / theta.cos().clamp(min=1e-6)  # float32's pi/2 is larger than pi/2, where tan is below 0
        usual = self.layers(tan.log()[:, None])[:, 0]
        return (-usual).exp() * error / tan + usual
