"""A one-step affine student in worlds whose scores are known: what score distillation's losses are checked against."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad as gradient
from worlds import F64, PROCESSES, Affine, Gaussian, Mixture, Script, play

from stepdistill.batch import Batch
from stepdistill.roles import Roles
from stepdistill.strategies import Strategy

M, C = 0.7, 0.5  # the data's mean and spread
B, A = -0.2, 0.9  # the student G(z) = B + A z
U = torch.tensor([0.0, 0.2, 0.45, 0.7, 1.0], dtype=F64)  # where in its range each sample's time lies
T = len(U)
EVERY = pytest.mark.parametrize(("schedule", "kind"), PROCESSES)


def world(schedule, kind, teacher, size=4, fake=None, b=B, a=A) -> Roles:
    """An affine student and, unless another is given, its exact fake score."""
    return play(schedule, kind, teacher, student=Affine(b, a, size), fake=fake or Gaussian(b, abs(a)))


def first(strategy: Strategy, roles: Roles, z: Tensor, eps, u=U, **batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The student's loss and logs, each sample (one for each time) holding all nodes z, eps."""
    batch = {"cond": {}, "null": None, **batch}
    n = len(u[0]) if isinstance(u, list) else len(u)
    draw = Script(uniform=u, normal=eps)
    who, loss, logs = next(strategy.losses(roles, Batch(noise=z.expand(n, -1), **batch), draw))
    assert who == "student"
    return loss, logs


def moved(loss: Tensor, roles: Roles) -> list[float]:
    """The loss's gradient in the student's b and a."""
    return [g.sum().item() for g in gradient(loss, roles.student.parameters())]


def levels(schedule, low=0.02, high=0.98) -> list[Tensor]:
    """alpha and sigma [T, 1] of the drawn times."""
    return [c[:, None] for c in schedule.alpha_sigma(schedule.warp(low + (high - low) * U))]


def normalizer(roles, teacher, a, s, z, eps) -> Tensor:
    """mean |x0 - D_real| [T, 1], written out."""
    x0 = roles.student.net.b.detach() + roles.student.net.a.detach() * z
    return (x0 - teacher(a * x0 + s * eps, a, s, {})[0]).abs().mean(1, keepdim=True)


def divergence(f, b, a, alpha, sigma) -> Tensor:
    """The integral of q f(p / q) over x_t for the mixture p and the student's q, differentiable in b and a; f of log r."""
    x = torch.linspace(-12, 12, 24001, dtype=F64)
    log_q = Gaussian(b, a).log_density(x, alpha, sigma)
    log_r = Mixture().log_density(x, alpha, sigma) - log_q
    return (log_q.exp() * f(log_r)).sum() * (x[1] - x[0])


def softened(log_r: Tensor) -> Tensor:
    """f of the softened reverse KL, (r + 1) log(1/2 + 1 / (2 r))."""
    return (log_r.exp() + 1) * (torch.nn.functional.softplus(-log_r) - torch.tensor(2.0, dtype=F64).log())


def expected(f, alpha, sigma) -> list[float]:
    """The divergence's gradient in the student's b and a."""
    b, a = (torch.tensor(x, dtype=F64, requires_grad=True) for x in (B, A))
    return [g.item() for g in gradient(divergence(f, b, a, alpha, sigma), (b, a))]


class Ideal(nn.Module):
    """The optimal discriminator: log p_t / q_t of the features [x_t, alpha, sigma]; q is the student as it is."""

    def forward(self, tokens):
        x_t, a, s = tokens.unbind(-1)
        return Mixture().log_density(x_t, a, s) - Gaussian(B, A).log_density(x_t, a, s)
