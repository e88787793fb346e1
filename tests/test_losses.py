"""Losses: values and gradients in float64 against closed forms."""

import math

import pytest
import torch
from torch.autograd import grad as gradient
from worlds import F64

from stepdistill.diffusion import Prediction
from stepdistill.losses import (
    denoising,
    distribution_matching,
    gan_critic,
    gan_student,
    pseudo_huber,
    surrogate,
)

GENERATOR = torch.Generator().manual_seed(0)
X, Y, Z = torch.randn(3, 4, 3, 5, dtype=F64, generator=GENERATOR)


def leaf(x):
    return x.clone().requires_grad_()


def test_surrogate_has_the_given_gradient():
    x, g = leaf(X), leaf(Y)
    loss = surrogate(x, g)
    assert torch.allclose(loss, 0.5 * Y.square().mean())
    assert torch.allclose(*gradient(loss, x), Y / Y.numel(), rtol=1e-12)
    assert gradient(surrogate(x, g), g, allow_unused=True) == (None,)


@pytest.mark.parametrize("weight", [None, torch.tensor([0.0, 1.0, 0.5, 3.0], dtype=F64)])
def test_matching_gradient_is_the_normalized_difference(weight):
    x, real, fake = leaf(X), leaf(Y), leaf(Z)
    got, *others = gradient(distribution_matching(x, real, fake, weight), (x, real, fake), allow_unused=True)
    h = torch.ones(4) if weight is None else weight
    for i in range(4):  # each sample by its own mean |x0 - D_real|
        want = h[i] * (Z[i] - Y[i]) / (X[i] - Y[i]).abs().mean() / X.numel()
        assert torch.allclose(got[i], want, rtol=1e-12)
    assert others == [None, None]


def test_matching_gradient_does_not_know_the_scale_of_latents():
    a, b = (gradient(distribution_matching(x := leaf(k * X), k * Y, k * Z), x)[0] for k in (1.0, 37.0))
    assert torch.allclose(a, b, rtol=1e-12)


def test_matching_survives_a_teacher_that_agrees():
    (got,) = gradient(distribution_matching(x := leaf(X), X, X + 1e-7), x)
    assert torch.allclose(got, torch.full_like(X, 1e-7 / 1e-5 / X.numel()), rtol=1e-6)


def test_pseudo_huber():
    a, b = leaf(torch.tensor([3.0, 0.0, -3.0], dtype=F64)), torch.zeros(3, dtype=F64)
    loss = pseudo_huber(a, b, 4.0)
    assert loss.item() == pytest.approx(2 / 3, rel=1e-12)  # 3-4-5: 5 - 4 twice, 0 once, over 3 entries
    assert gradient(loss, a)[0].tolist() == pytest.approx([0.2, 0.0, -0.2], rel=1e-12)


def test_pseudo_huber_lies_between_its_limits():
    d = X - Y
    assert pseudo_huber(X, Y, 1e-9).item() == pytest.approx(d.abs().mean().item(), rel=1e-8)
    assert 2e3 * pseudo_huber(X, Y, 1e3).item() == pytest.approx(d.square().mean().item(), rel=1e-5)


@pytest.mark.parametrize(("space", "weight"), [("x0", 1), ("eps", 9 / 16), ("v", 25 / 16), ("flow", 49 / 16)])
def test_denoising_spaces_differ_by_a_weight(space, weight):
    """At alpha 0.6, sigma 0.8, an error of x0 by d is one of eps by -alpha d / sigma, and so on."""
    a, s = torch.full((4, 1, 1), 0.6, dtype=F64), torch.full((4, 1, 1), 0.8, dtype=F64)
    p = Prediction(X, (a * Y + s * Z - a * X) / s, a, s)  # says X, with the noise that its x_t then implies
    assert denoising(p, Prediction(Y, Z, p.alpha, p.sigma), space).item() == pytest.approx(
        weight * (X - Y).square().mean().item(), rel=1e-12
    )


def test_denoising_may_weigh_samples():
    a = s = torch.ones(4, 1, 1, dtype=F64)
    p, target, weight = Prediction(X, Z, a, s), Prediction(Y, Z, a, s), torch.tensor([0.0, 1.0, 2.0, 0.5], dtype=F64)
    each = (X - Y).square().flatten(1).mean(1)
    assert denoising(p, target, "x0", weight).item() == pytest.approx((weight * each).mean().item(), rel=1e-12)


def test_gan_student():
    logits = leaf(torch.tensor([0.0, math.log(3.0)], dtype=F64))
    loss = gan_student(logits)
    assert loss.item() == pytest.approx((math.log(2) + math.log(4 / 3)) / 2, rel=1e-12)
    assert gradient(loss, logits)[0].tolist() == pytest.approx([-1 / 4, -1 / 8], rel=1e-12)


def test_gan_critic_is_least_at_the_log_ratio_of_densities():
    """Two places: 3 and 7 of ten real samples lie there, and 6 and 4 of ten fake ones."""
    best = torch.tensor([math.log(3 / 6), math.log(7 / 4)], dtype=F64)
    real, fake = torch.tensor([0] * 3 + [1] * 7), torch.tensor([0] * 6 + [1] * 4)
    loss = gan_critic((at := leaf(best))[real], at[fake])
    assert torch.allclose(*gradient(loss, at), torch.zeros(2, dtype=F64), atol=1e-12)
    p, q = torch.tensor([[0.3, 0.7], [0.6, 0.4]], dtype=F64)
    js = (p * (p / (p + q)).log() + q * (q / (p + q)).log()).sum()
    assert loss.item() == pytest.approx(-js.item(), rel=1e-12)
    assert gan_critic(torch.tensor([2.0]), torch.tensor([-2.0])) < gan_critic(torch.tensor([-2.0]), torch.tensor([2.0]))
