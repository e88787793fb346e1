"""Pieces that several strategies are made of."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..batch import Batch, Draw
from ..diffusion import Prediction
from ..losses import denoising, distribution_matching, gan_critic
from ..roles import Roles
from ..sampling import Hop, Inference, ask, rollout, trailing
from ..schedules import RectifiedFlow, Schedule
from .base import Loss, Strategy

INSIDE = (0.002, 0.998)  # drawn times stay off the ends, where reading one parameterization from another divides by zero


def renoises(choice: bool | None, schedule: Schedule) -> bool:
    """A strategy's `renoise` field; None: new noise on DDPM tables, the deterministic Euler step on rectified flow."""
    return not isinstance(schedule, RectifiedFlow) if choice is None else choice


def check_ranges(strategy: Strategy, *names: str) -> Iterator[str]:
    """A problem for each of these fields, pairs (or None), whose second number is not above its first."""
    for name in names:
        pair = getattr(strategy, name)
        if pair is not None and pair[0] >= pair[1]:
            yield f"{name}: {list(pair)} is no range; write the smaller number first"


def check_times(steps: int, times: tuple[float, ...] | None) -> Iterator[str]:
    """Problems with a student's own times, as `own_steps` takes them."""
    if times is not None and len(times) != steps:
        yield f"times: {len(times)} of them for {steps} steps; give one time a step, or null"
    if times is not None and sorted(set(times), reverse=True) != list(times):
        yield f"times: {list(times)} do not fall; write them from noise (1) down"


def own_steps(name: str, schedule: Schedule, steps: int, times: tuple[float, ...] | None, asked: int | None) -> tuple[Hop, ...]:
    """The hops, from noise down, of a student that is trained at its own few times only, in `asked` steps (None: all).

    name: of the strategy, for the message; times: in (0, 1], falling; None: those of `steps` equal solver steps.

    Raises:
        ValueError: it is asked to take a number of steps whose times it was not trained at.
    """
    hops = trailing(schedule.grid(steps)) if times is None else tuple(map(Hop, times))
    if steps % (asked or steps):
        raise ValueError(f"a {name} student of {steps} steps cannot take {asked}; use a divisor of {steps}")
    return hops[:: steps // (asked or steps)]


def any_steps(name: str, schedule: Schedule, steps: int, times: tuple[float, ...] | None, asked: int | None) -> tuple[Hop, ...]:
    """The hops, from noise down, of a student that may be asked at any time: of `asked` equal solver steps (None: `steps`).
    Where it has times of its own, it is as in `own_steps`."""
    return trailing(schedule.grid(asked or steps)) if times is None else own_steps(name, schedule, steps, times, asked)


def times_above(since: float | Tensor, schedule: Schedule, draw: Draw, low: float, high: float) -> Tensor:
    """Random times [B] between `since` (a number or [B]) and 1, uniform before the schedule's warp, off the ends by the shares
    low and 1 - high."""
    least = schedule.unwarp(since)
    return schedule.warp(least + (1 - least) * draw.uniform(low, high))


def generate(
    roles: Roles, how: Inference, batch: Batch, draw: Draw, grad: bool, hops: range | None = None
) -> tuple[Prediction, float]:
    """The student's prediction after a random number of its own steps, the same for the whole iteration; and its time.

    Backward simulation, DMD2, arXiv:2405.14867, Sec. 4.4: it walks there from pure noise without gradient, as it will at
    inference; only its last evaluation has one (if grad), which is one of `hops` (None: of all).
    """
    hops = range(len(how.hops)) if hops is None else hops
    last = hops[draw.choice(len(hops))]
    x_t, _ = rollout(roles, how, batch.noise, batch.cond, draw.normal, last)
    with torch.set_grad_enabled(grad):
        return ask(roles, how, how.hops[last], x_t, batch.cond), how.hops[last].time


def match(roles: Roles, x0: Tensor, batch: Batch, draw: Draw, t_range: tuple[float, float], scale: float) -> Tensor:
    """Distribution matching of the student's samples x0 [B, ...] with the teacher guided at `scale`, at one random time for
    each. DMD, arXiv:2311.18828, Eq. 7."""
    t = roles.schedule.warp(draw.uniform(*t_range))
    x_t = roles.noise(x0, t, draw.normal(x0))
    with torch.no_grad():
        real = roles.teacher.guided(x_t, t, batch.cond, batch.null, scale)
        fake = roles.fake(x_t, t, batch.cond)
    return distribution_matching(x0, real.x0, fake.x0)


def fit_fake(
    roles: Roles,
    x: Tensor,
    cond: dict[str, Tensor],
    draw: Draw,
    space: str | None = None,
    since: float = 0.0,
    clamp: float | None = None,
) -> Tensor:
    """Denoising score matching of the fake score on the student's samples x [B, ...] (detached), clean or at time `since`.

    space: what is compared (see `losses.denoising`); None: what the network predicts. clamp: None, or c in the weight
    min(1, c sigma^2) of Phased DMD, arXiv:2510.27684, Eq. 13, with the sigma of q(x_t | x_since).
    """
    t, eps = times_above(since, roles.schedule, draw, *INSIDE), draw.normal(x)
    s = torch.full_like(t, since) if since else None
    p, target = roles.fake(roles.noise(x, t, eps, s), t, cond), roles.denoising_target(x, t, eps, s)
    weight = None if clamp is None else (clamp * roles.transition(t, s)[1] ** 2).clamp(max=1)
    return denoising(p, target, space or roles.fake.kind, weight)


def begin_target(roles: Roles) -> None:
    """Let the target network, if there is one, begin as the student: a LoRA's A is random, so its average must start there."""
    if "target" in roles:
        roles.target.follow(roles.student)


def move_target(roles: Roles, moved: set[str], decay: float | None) -> None:
    """Let it follow the student, if that moved: a running average, which keeps the share `decay` of itself."""
    if "target" in roles and "student" in moved:
        roles.target.follow(roles.student, decay)


def drop_prompts(batch: Batch, which: Tensor) -> dict[str, Tensor]:
    """The batch's encoded prompts, empty for the samples `which` [B] marks; all of them if there is no empty prompt."""
    if batch.null is None:
        return batch.cond
    return {name: torch.where(which.reshape(-1, *[1] * (x.ndim - 1)), batch.null[name], x) for name, x in batch.cond.items()}


class Head(nn.Module):
    """Discriminator on a network's tokens [B, L, C] -> logits [B, L], one for each token."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(tokens)[..., 0]


def logits(
    head: Head, reads: str, roles: Roles, x: Tensor, cond: dict[str, Tensor], draw: Draw, since: Tensor | None = None
) -> Tensor:
    """The discriminator on samples x [B, ...] at times `since` [B] (None: clean), noised on to random times: [B, L], from the
    features of role `reads`."""
    t = times_above(0.0 if since is None else since, roles.schedule, draw, *INSIDE)
    return head(roles[reads].features(roles.noise(x, t, draw.normal(x), since), t, cond)[1])


def discriminate(
    head: Head,
    reads: str,
    roles: Roles,
    real: Tensor,
    fake: Tensor,
    cond: dict[str, Tensor],
    draw: Draw,
    weight: float = 1.0,
    since: Tensor | None = None,
) -> Loss:
    """The critic's loss of telling real samples from the student's [B, ...] (detached), as in `logits`. DMD2, Sec. 4.3."""
    real, fake = (logits(head, reads, roles, x, cond, draw, since) for x in (real, fake))
    loss = gan_critic(real, fake)
    return "critic", weight * loss, {"gan": loss, "real": real.mean(), "fake": fake.mean()}
