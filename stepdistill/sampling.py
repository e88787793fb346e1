"""Few-step sampling: one loop for rollouts in training, for validation, evaluation and the check of exports."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice, zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from .diffusion import Prediction
from .roles import Roles


class Hop(NamedTuple):
    """One evaluation of a sampler: which role is asked, at which time, with which guidance scale."""

    time: float  # in [0, 1], 1 is noise
    role: str = "student"
    scale: float = 1.0  # 1: unguided
    steady: bool = False  # the step after it is the deterministic one, whatever the sampler does elsewhere


@dataclass(frozen=True)
class Inference:
    """How a student is sampled. Training rollouts, validation, evaluation and exports all read it."""

    hops: tuple[Hop, ...]
    renoise: bool = True  # new noise after each hop (LCM, DMD2); False: the deterministic DDIM or Euler step
    told: float | None = None  # the time that a student's network hears at every hop, if not the hop's own
    guidance: float | None = None  # told to a student's network, if it embeds its guidance scale
    eta: float | None = None  # TCD's gamma in [0, 1], see `step`; None: as renoise says, and clean in the end

    @property
    def nfe(self) -> int:
        """Network evaluations of a picture; guidance makes two of a hop."""
        return sum(1 if hop.scale == 1 else 2 for hop in self.hops)

    @property
    def draws(self) -> bool:
        """Whether there is new noise after each hop."""
        return self.renoise if self.eta is None else self.eta > 0


Normal = Callable[[Tensor], Tensor]  # x -> standard normal noise of x's shape


@torch.no_grad()
def walk(roles: Roles, how: Inference, x_t: Tensor, cond, normal: Normal, null=None) -> Iterator[tuple[Prediction, Tensor]]:
    """Pure noise x_t [B, ...] through the hops, each in a network evaluation (two if it is guided): its prediction, and x as
    the next hop will see it, or (of the last) where sampling ends."""
    for here, there in zip_longest(how.hops, how.hops[1:]):
        p = ask(roles, how, here, x_t, cond, null)
        after = replace(how, renoise=False, eta=None) if here.steady else how
        x_t = step(roles, after, p, there.time if there else None, normal)
        yield p, x_t


@torch.no_grad()
def rollout(roles: Roles, how: Inference, x_t: Tensor, cond, normal: Normal, k: int, null=None) -> tuple[Tensor, Tensor]:
    """Walk pure noise x_t [B, ...] through the first k hops; returns x_t and t [B] as the next hop will see them."""
    for _, moved in islice(walk(roles, how, x_t, cond, normal, null), k):
        x_t = moved
    return x_t, x_t.new_full([len(x_t)], how.hops[k].time)


@torch.no_grad()
def sample(roles: Roles, how: Inference, x_t: Tensor, cond, normal: Normal = torch.randn_like, null=None) -> Tensor:
    """Latents [B, ...] from pure noise: clean ones or, with eta, those at time 0, where tables leave a little noise."""
    for _, moved in walk(roles, how, x_t, cond, normal, null):
        x_t = moved
    return x_t


def base_first(how: Inference, k: int, scale: float) -> Inference:
    """The same steps, the first k of them by the teacher, guided at scale: the base model spreads the pictures, the student
    paints them. Diversity distillation, arXiv:2503.10637.

    The teacher's prediction is the mean of many pictures, which new noise would drown: so its steps are DDIM or Euler.

    Raises:
        ValueError: no step is left to the student.
    """
    n = len(how.hops)
    if not 0 <= k < n:
        raise ValueError(f"{k} of {n} steps by the base leave none to the student; it can be 0 to {n - 1}")
    hops = (hop._replace(role="teacher", scale=scale, steady=True) for hop in how.hops[:k])
    return replace(how, hops=(*hops, *how.hops[k:]))


def step(roles: Roles, how: Inference, p: Prediction, time: float | None, normal: Normal) -> Tensor:
    """From a prediction to x at a lower noise level, or (None) to where sampling ends, [B, ...].

    With eta, strategic stochastic sampling: deterministically to 1 - eta of that time, then up by new noise. TCD,
    arXiv:2402.19159, Alg. 4.
    """
    full = p.x0.new_full([len(p.x0)], 1.0)
    if time is None:
        return p.x0 if how.eta is None else roles.move(p, full * 0)
    t = full * time
    if how.eta is None:
        return roles.noise(p.x0, t, normal(p.x0)) if how.renoise else roles.move(p, t)
    s = full * roles.schedule.scaled(time, 1 - how.eta)
    x_s = roles.move(p, s)
    return roles.noise(x_s, t, normal(x_s), s) if how.draws else x_s


def ask(roles: Roles, how: Inference, hop: Hop, x_t: Tensor, cond, null=None):
    """The prediction of one hop, with gradient where the caller allows it."""
    full = x_t.new_full([len(x_t)], 1.0)
    told = None
    if hop.role != "teacher":  # which hears nothing but what it was trained on
        if how.guidance is not None:
            cond = cond | {"guidance": full * how.guidance}
        told = None if how.told is None else full * how.told
    if hop.scale == 1:
        return roles[hop.role](x_t, full * hop.time, cond, told)
    return roles[hop.role].guided(x_t, full * hop.time, cond, null, hop.scale)


def trailing(times: tuple[float, ...], role: str = "student", scale: float = 1.0) -> tuple[Hop, ...]:
    """The hops of a schedule's grid, from noise down: its last time first, 0 left out."""
    return tuple(Hop(t, role, scale) for t in times[:0:-1])
