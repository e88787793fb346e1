"""Worlds whose score is known in closed form, so that the real losses run in float64 and can be checked exactly.

A net here maps (x_t, alpha, sigma, cond) to what it believes, (x0, eps); `World` puts that in a network's
parameterization, and `play` makes real roles of nets. `Script` stands in for Draw and serves quadrature nodes.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from stepdistill.diffusion import like
from stepdistill.families import Family
from stepdistill.roles import Denoiser, Roles
from stepdistill.schedules import RectifiedFlow, Schedule, VariancePreserving

F64 = torch.float64
SD_SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
VP = VariancePreserving.from_alphas_cumprod(DDIMScheduler(**SD_SCHEDULER).alphas_cumprod)
FLOW, SHIFTED = RectifiedFlow(), RectifiedFlow(shift=3.0)
PROCESSES = [(VP, "eps"), (VP, "v"), (FLOW, "flow"), (SHIFTED, "flow")]  # what the families' teachers are


def spread(a: Tensor | float, s: Tensor | float, std: Tensor | float) -> Tensor | float:
    """The standard deviation S of x_t where x0 has standard deviation std."""
    return (a**2 * std**2 + s**2) ** 0.5


class Gaussian(nn.Module):
    """The exact posterior for x0 ~ N(mean, std^2); mean None: cond["mean"]. Parameters stay parameters."""

    def __init__(self, mean: Tensor | float | None, std: Tensor | float):
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, x_t, a, s, cond):
        mean = cond["mean"] if self.mean is None else self.mean
        off = (x_t - a * mean) / spread(a, s, self.std) ** 2
        return mean + a * self.std**2 * off, s * off

    def log_density(self, x_t, a, s):
        S = spread(a, s, self.std)
        return -0.5 * ((x_t - a * self.mean) / S) ** 2 - torch.as_tensor(S * math.sqrt(2 * math.pi)).log()


class Mixture(nn.Module):
    """The exact posterior where every entry of x0 is from the same one-dimensional mixture of Gaussians."""

    def __init__(self, weights=(0.3, 0.7), means=(-1.5, 1.0), stds=(0.4, 0.7)):
        super().__init__()
        self.parts = [(w, Gaussian(m, c)) for w, m, c in zip(weights, means, stds, strict=True)]

    def log_density(self, x_t, a, s):
        return torch.stack([math.log(w) + g.log_density(x_t, a, s) for w, g in self.parts]).logsumexp(0)

    def forward(self, x_t, a, s, cond):
        share = torch.stack([math.log(w) + g.log_density(x_t, a, s) for w, g in self.parts]).softmax(0)
        x0, eps = zip(*(g(x_t, a, s, cond) for _, g in self.parts), strict=True)
        return (share * torch.stack(x0)).sum(0), (share * torch.stack(eps)).sum(0)


class Consistency(nn.Module):
    """Where the ODE trajectory of N(mean, std^2) through x_t ends, at coefficients `end`; times gain, plus shift."""

    def __init__(self, mean: Tensor | float | None, std: float, end=(1.0, 0.0), gain=1.0, shift=0.0):
        super().__init__()
        self.mean, self.std, self.end, self.gain, self.shift = mean, std, end, gain, shift

    def forward(self, x_t, a, s, cond):
        mean, (a_end, s_end) = cond["mean"] if self.mean is None else self.mean, self.end
        x0 = a_end * mean + self.gain * spread(a_end, s_end, self.std) / spread(a, s, self.std) * (x_t - a * mean)
        return x0 + self.shift, (x_t - a * (x0 + self.shift)) / s.clamp(min=1e-300)


class Solver(nn.Module):
    """One of N(mean, std^2) whose DDIM or Euler step from time t to jump(t) lands on the exact ODE trajectory, times gain,
    plus shift."""

    def __init__(self, mean: float | None, std: float, schedule: Schedule, jump, gain=1.0, shift=0.0):
        super().__init__()
        self.mean, self.std, self.schedule, self.jump, self.gain, self.shift = mean, std, schedule, jump, gain, shift

    def forward(self, x_t, a, s, cond):
        mean = cond["mean"] if self.mean is None else self.mean
        t = self.schedule.time(torch.atan2(s, a).flatten())
        a_s, s_s = (like(c, x_t) for c in self.schedule.alpha_sigma(self.jump(t)))
        away = spread(a_s, s_s, self.std) / spread(a, s, self.std) * (x_t - a * mean)
        x_s = a_s * mean + self.gain * away + self.shift
        determinant = a_s * s - a * s_s
        return (s * x_s - s_s * x_t) / determinant, (a_s * x_t - a * x_s) / determinant


class Affine(nn.Module):
    """A one-step student G(z) = b + a z, with a parameter of its own for every entry of a sample."""

    def __init__(self, b: float, a: float, *shape: int):
        super().__init__()
        self.b, self.a = (nn.Parameter(torch.full(shape, value, dtype=F64)) for value in (b, a))

    def forward(self, x_t, alpha, sigma, cond):
        x0 = self.b + self.a * x_t
        return x0, (x_t - alpha * x0) / sigma


class World(Family):
    """A family without a pipeline. Its features are [x_t, alpha, sigma], one token for each entry."""

    pipeline = "none"

    def __init__(self, schedule: Schedule, kind: str, net: nn.Module):
        self.schedule, self.kind, self.net, self.tap = schedule, kind, net, nn.Identity()

    def encode_prompts(self, prompts):
        return {}

    def forward(self, net, x_t, t, cond):
        a, s = (like(c, x_t) for c in self.schedule.alpha_sigma(t))
        self.tap(torch.stack([x_t, a.expand_as(x_t), s.expand_as(x_t)], -1))
        x0, eps = net(x_t, a, s, cond)
        return {"eps": eps, "x0": x0, "v": a * eps - s * x0, "flow": eps - x0}[self.kind]

    def decode(self, x0):
        return x0

    def feature_block(self, net):
        return self.tap

    def feature_tokens(self, out, _x_t, _cond):
        return out

    def feature_width(self, net):
        return 3


def play(schedule: Schedule, kind: str, teacher: nn.Module, **nets: nn.Module) -> Roles:
    """Real roles, each with its own net."""
    family = World(schedule, kind, teacher)
    roles = {name: Denoiser(family, net, whole=True) for name, net in nets.items()}
    return Roles(family, teacher=Denoiser(family, teacher), **roles)


class Script:
    """Serves scripted numbers where a strategy draws random ones: a list gives one entry a call, a tensor all calls."""

    def __init__(self, step: int = 0, normal=(), uniform=(), integer=(), choice: int = 0):
        self.step, self.shared = step, choice
        self.numbers = {"normal": normal, "uniform": uniform, "integer": integer}
        self.served = {name: 0 for name in self.numbers}

    def _next(self, name: str) -> Tensor:
        numbers, at = self.numbers[name], self.served[name]
        self.served[name] += 1
        return numbers if isinstance(numbers, Tensor) else numbers[at]

    def normal(self, like):
        return self._next("normal").expand_as(like)

    def uniform(self, low=0.0, high=1.0):
        return low + (high - low) * self._next("uniform")

    def integer(self, low, high):
        n = self._next("integer")
        assert (n >= low).all() and (n < high).all()
        return n

    def choice(self, n):
        assert self.shared < n
        return self.shared


def normal_nodes(n: int) -> tuple[Tensor, Tensor]:
    """Gauss-Hermite nodes and weights [n]: weighted sums are expectations over N(0, 1), exact to degree 2n - 1."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    return torch.tensor(nodes), torch.tensor(weights / weights.sum())


def pairs(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes z, eps and weights [n * n] for expectations over two independent standard normals."""
    x, w = normal_nodes(n)
    return x.repeat_interleave(n), x.repeat(n), torch.outer(w, w).flatten()


SIGNS = pairs(2)[:2]  # z, eps = +-1 with equal weights: plain means are exact for polynomials of degree 3 in either
