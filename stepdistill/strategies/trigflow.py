"""Continuous-time consistency of any teacher in TrigFlow's coordinates: what sCM and rCM share.

TrigFlow, Lu and Song 2024, arXiv:2410.11081, Sec. 3: x = cos(theta) x0 + sin(theta) eps, where F = dx/dtheta =
cos(theta) eps - sin(theta) x0 is what a network tells. Any teacher is one of its kind at x = x_t / |(alpha, sigma)| and the
angle of its signal-to-noise ratio (rCM, arXiv:2510.08431, Eq. 3). The data's standard deviation counts as 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..attention import jvp
from ..batch import Batch, Draw
from ..diffusion import Prediction, like, mix
from ..roles import Denoiser, Roles
from ..schedules import Schedule
from .shared import INSIDE


class Points(NamedTuple):
    """Where a consistency is asked of the student, and how the trajectory goes on there."""

    x: Tensor  # [n, ...] in TrigFlow's coordinates
    theta: Tensor  # [n] angles
    velocity: Tensor  # [n, ...] dx/dtheta
    cond: dict[str, Tensor]  # batch-first


def check_proposal(law: tuple[float, float]) -> Iterator[str]:
    """A problem with the law of random angles."""
    if law[1] <= 0:
        yield f"proposal: {law[1]:g} is no standard deviation; write one above 0"


def angle(schedule: Schedule, t: float, like: Tensor) -> Tensor:
    """The angle of time t, a scalar on the device of `like` [...]."""
    alpha, sigma = schedule.alpha_sigma(torch.full([1], t, dtype=like.dtype, device=like.device))
    return torch.atan2(sigma, alpha)[0]


def seen(schedule: Schedule, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """What a network sees of x [n, ...] at angles theta [n]: x_t [n, ...] and times [n]."""
    t = schedule.time(theta)
    alpha, sigma = schedule.alpha_sigma(t)
    return like((alpha**2 + sigma**2).sqrt(), x) * x, t


def random_angles(schedule: Schedule, u: Tensor, law: tuple[float, float]) -> Tensor:
    """Angles [n] whose tangent is log-normal, of uniform numbers u [n]; kept inside what the schedule reaches.

    law: mean and standard deviation of log tan theta.
    """
    theta = (law[0] + law[1] * torch.special.ndtri(u)).exp().atan()
    return theta.clamp(angle(schedule, INSIDE[0], u), angle(schedule, 1.0, u))


def turned(x: Tensor, velocity: Tensor, by: Tensor) -> Tensor:
    """x after a first-order step along a trajectory, by angles [n]: what a DDIM step is in these coordinates."""
    return mix(x, velocity, by.cos(), by.sin())


def guided(roles: Roles, x: Tensor, theta: Tensor, cond, null, scale: float) -> Tensor:
    """The guided teacher's velocity [n, ...]."""
    return roles.teacher.guided(*seen(roles.schedule, x, theta), cond, null, scale).trig


def points(
    roles: Roles, batch: Batch, draw: Draw, scale: float | None, law: tuple[float, float], trajectory: int | None
) -> Points:
    """On noised pictures, or so many of each of the teacher's trajectories."""
    if trajectory is None:
        return on_pictures(roles, batch, draw, scale, law)
    return on_trajectories(roles, batch, draw, scale, law, trajectory)


@torch.no_grad()
def on_pictures(roles: Roles, batch: Batch, draw: Draw, scale: float | None, law: tuple[float, float]) -> Points:
    """Noised pictures, with the guided teacher's velocity there; scale None: with their own, that of x0 and noise."""
    theta = random_angles(roles.schedule, draw.uniform(), law).to(batch.x0)
    x = mix(batch.x0, batch.noise, theta.cos(), theta.sin())
    if scale is None:
        return Points(x, theta, mix(batch.noise, -batch.x0, theta.cos(), theta.sin()), batch.cond)
    return Points(x, theta, guided(roles, x, theta, batch.cond, batch.null, scale), batch.cond)


@torch.no_grad()
def on_trajectories(roles: Roles, batch: Batch, draw: Draw, scale: float, law: tuple[float, float], count: int) -> Points:
    """`count` points of each of the guided teacher's own trajectories from noise, one after the other: no picture is needed.

    Their angles have the same law, one in each of `count` equally likely ranges; the velocities with which the teacher goes
    on are the points' own. TBCM, arXiv:2511.20410.
    """
    x, theta = batch.noise, angle(roles.schedule, 1.0, batch.noise).expand(len(batch.noise))
    velocity, points = guided(roles, x, theta, batch.cond, batch.null, scale), []
    for k in reversed(range(count)):
        below = torch.minimum(random_angles(roles.schedule, (k + draw.uniform()) / count, law).to(x), theta)
        x, theta = turned(x, velocity, below - theta), below
        velocity = guided(roles, x, theta, batch.cond, batch.null, scale)
        points.append((x, theta, velocity))
    x, theta, velocity = (torch.cat(some) for some in zip(*points, strict=True))
    return Points(x, theta, velocity, {name: y.repeat(count, *[1] * (y.ndim - 1)) for name, y in batch.cond.items()})


def predicted(role: Denoiser, schedule: Schedule, at: Points) -> Prediction:
    """A role's prediction at the points, with gradient where the caller allows it."""
    return role(*seen(schedule, at.x, at.theta), at.cond)


@torch.no_grad()
def derivative(role: Denoiser, schedule: Schedule, at: Points, h: float | None) -> Tensor:
    """cos(theta) sin(theta) dF/dtheta of a role along the trajectories, [n, ...], without gradient.

    h: None, for the exact derivative; or the angle of a central difference, whose error is of second order in it (of first
    order nearer to the schedule's ends than that).
    """

    def f(x: Tensor, theta: Tensor) -> Tensor:
        return predicted(role, schedule, at._replace(x=x, theta=theta)).trig

    speed = at.theta.cos() * at.theta.sin()
    if h is None:
        return jvp(f, (at.x, at.theta), (like(speed, at.x) * at.velocity, speed))[1]
    ends = ((at.theta + h).clamp(max=angle(schedule, 1.0, at.theta)), (at.theta - h).clamp(min=angle(schedule, 0.0, at.theta)))
    ahead, behind = (f(turned(at.x, at.velocity, end - at.theta), end) for end in ends)
    return like(speed / (ends[0] - ends[1]), at.x) * (ahead - behind)


def consistency(roles: Roles, at: Points, share: float, c: float, h: float | None) -> tuple[Tensor, Tensor]:
    """The mean squared error [n] of the student's F against sg(F + g / (|g| + c)), and |g| [n], its root mean square.

        g = -cos^2(theta) (F - dx/dtheta) - share cos(theta) sin(theta) (x + dF/dtheta)

    With share 1, g is cos(theta) df/dtheta for the consistency function f = cos(theta) x - sin(theta) F: arXiv:2410.11081,
    Eq. 6 and 8, Sec. 4.2.
    """
    slope = derivative(roles.student, roles.schedule, at, h)  # before there is a graph in memory
    F = predicted(roles.student, roles.schedule, at).trig
    with torch.no_grad():
        cos, sin = like(at.theta.cos(), at.x), like(at.theta.sin(), at.x)
        g = -(cos**2) * (F - at.velocity) - share * (cos * sin * at.x + slope)
        size = g.square().flatten(1).mean(1).sqrt()
        target = F + g / like(size + c, g)
    return (F - target).square().flatten(1).mean(1), size
