"""Noise schedules: x_t = alpha(t) x0 + sigma(t) eps, with t in [0, 1] and t = 1 the noise end.

Every schedule is an angle theta(t) = atan2(sigma, alpha); `time` inverts it, `warp` spreads uniform numbers over time,
`unwarp` inverts that, and `grid` gives the times that a stock scheduler visits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Schedule(Protocol):
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Times [B] in [0, 1] -> alpha [B], sigma [B]."""

    def time(self, theta: Tensor) -> Tensor:
        """Angles atan2(sigma, alpha) [B] in [0, pi/2] -> times [B]."""

    def warp(self, u: Tensor) -> Tensor:
        """Uniform numbers in [0, 1] -> times with the density that the teacher's own sampler has (its shift)."""

    def unwarp(self, t: float | Tensor) -> float | Tensor:
        """The numbers that `warp` takes to times t."""

    def scaled(self, t: float, by: float) -> float:
        """The time `by` t, by in [0, 1]; on a table that of a whole entry, rounded down as TCDScheduler does."""

    def grid(self, n: int) -> tuple[float, ...]:
        """The n + 1 times 0 = g[0] < ... < g[n] of n equal solver steps; g[:0:-1] is the sampler's "trailing" grid."""


@dataclass(frozen=True)
class RectifiedFlow:
    """alpha = 1 - t, sigma = t (SD3, FLUX, Sana, Wan), arXiv:2209.03003; shift as in SD3, arXiv:2403.03206, Eq. 23."""

    shift: float = 1.0  # above 0; larger spends more steps at high noise

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    def time(self, theta: Tensor) -> Tensor:
        return theta.sin() / (theta.sin() + theta.cos())

    def warp(self, u: Tensor) -> Tensor:
        return self.shift * u / (1 + (self.shift - 1) * u)

    def unwarp(self, t: float | Tensor) -> float | Tensor:
        return t / (self.shift - (self.shift - 1) * t)

    def scaled(self, t: float, by: float) -> float:
        return by * t

    def grid(self, n: int) -> tuple[float, ...]:
        return tuple(self.warp(torch.arange(n + 1, dtype=torch.float64) / n).tolist())


@dataclass(frozen=True, eq=False)
class VariancePreserving:
    """alpha = cos theta(t), sigma = sin theta(t), theta linear between the entries of a DDPM table (SD 1.5, SDXL).

    Entry k of a table of T entries (a diffusers timestep) is time t = k / (T - 1).
    """

    theta: Tensor  # [T] increasing, float64

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Tensor) -> VariancePreserving:
        table = alphas_cumprod.double()
        return cls(torch.atan2((1 - table).sqrt(), table.sqrt()))

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        table = self.theta.to(t.device)
        at = t.double() * (len(table) - 1)
        low = at.floor().long().clamp(0, len(table) - 2)
        angle = table[low].lerp(table[low + 1], at - low)
        return angle.cos().to(t.dtype), angle.sin().to(t.dtype)

    def time(self, theta: Tensor) -> Tensor:
        table, angle = self.theta.to(theta.device), theta.double()
        low = ((table < angle[..., None]).sum(-1) - 1).clamp(0, len(table) - 2)
        at = low + (angle - table[low]) / (table[low + 1] - table[low])
        return (at / (len(table) - 1)).to(theta.dtype)

    def warp(self, u: Tensor) -> Tensor:
        return u

    def unwarp(self, t: float | Tensor) -> float | Tensor:
        return t

    def scaled(self, t: float, by: float) -> float:
        last = len(self.theta) - 1
        return math.floor(by * torch.tensor(round(t * last))) / last  # in float32: 0.7 of 10 may be 6 there

    def grid(self, n: int) -> tuple[float, ...]:
        size = len(self.theta)
        return tuple(max(0.0, (round(size * k / n) - 1) / (size - 1)) for k in range(n + 1))
