"""f-distill against closed forms, in worlds whose scores and ratios are known (reference: methods, 10)."""

import math

import pytest
import torch
import torch.nn.functional as F
from matching import A, B, C, Ideal, M, T, expected, first, levels, softened, world
from torch.autograd import grad as gradient
from worlds import F64, FLOW, SIGNS, VP, Affine, Gaussian, Mixture, play

from stepdistill.batch import Batch, Draw
from stepdistill.strategies.dmd2 import DMD2
from stepdistill.strategies.f_distill import WEIGHTS, Averages, FDistill

WIDE = (1e-9, 1e9)
DIVERGENCES = {  # f of log r, written from the definitions, not from h
    "reverse_kl": lambda x: -x,
    "softened_reverse_kl": softened,
    "js": lambda x: x.exp() * x - (x.exp() + 1) * (F.softplus(x) - math.log(2)),
    "squared_hellinger": lambda x: 1 - (x / 2).exp(),
    "forward_kl": lambda x: x.exp() * x,
    "jeffreys": lambda x: (x.exp() - 1) * x,
    "neyman": lambda x: (1 - x.exp()).square() / x.exp(),
}


def plane():
    """Nodes z, eps and weights [N, 1] for expectations over two standard normals: the trapezoidal rule, since some of the
    integrands fall off too slowly for Gauss-Hermite."""
    x = torch.arange(-14, 14.01, 0.125, dtype=F64)
    z, eps = (grid.reshape(-1, 1) for grid in torch.meshgrid(x, x, indexing="ij"))
    w = (-(z**2 + eps**2) / 2).exp()
    return z, eps, w / w.sum()


def test_all_divergences_are_here():
    assert set(DIVERGENCES) == set(WEIGHTS)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_weight_is_the_second_derivative_times_the_ratio_squared(name):
    r = torch.tensor([0.1, 0.5, 1.0, 3.0, 20.0], dtype=F64, requires_grad=True)
    (slope,) = gradient(DIVERGENCES[name](r.log()).sum(), r, create_graph=True)
    (curve,) = gradient(slope.sum(), r)
    assert torch.allclose(WEIGHTS[name](r), curve * r**2, rtol=1e-9)


@pytest.mark.parametrize(("schedule", "kind"), [(VP, "eps"), (FLOW, "flow")])
@pytest.mark.parametrize("at", [0.6, 0.9])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradient_is_that_of_the_divergence(schedule, kind, at, name):
    """With the optimal discriminator, alpha^2 / sigma^2 times the loss's gradient (normalizers undone) is that of the integral
    of q f(p / q). Each node is a sample of its own, since a sample has one ratio."""
    alpha, sigma = schedule.alpha_sigma(torch.tensor([[at]], dtype=F64))
    teacher, q, (z, eps, w) = Mixture(), Gaussian(B, A), plane()
    x_t = alpha * (B + A * z) + sigma * eps
    log_r = teacher.log_density(x_t, alpha, sigma) - q.log_density(x_t, alpha, sigma)
    z, eps, w, log_r = (x[log_r > -18][:, None] for x in (z, eps, w, log_r))  # further out nothing weighs anything
    roles = play(schedule, kind, teacher, student=Affine(B, A, len(z), 1), fake=q)
    strategy = FDistill(divergence=name, steps=1, guidance=1.0, t_range=(0.0, 1.0), bins=None, ratio_range=WIDE)
    strategy.head = Ideal()
    _, logs = first(strategy, roles, z, eps, u=torch.full((len(z),), at, dtype=F64))
    x0 = B + A * z
    off = (x0 - teacher(alpha * x0 + sigma * eps, alpha, sigma, {})[0]).abs().clamp(min=1e-5)
    undo = WEIGHTS[name](log_r.exp()).mean() * off * len(z)
    got = [(w * undo * alpha**2 / sigma**2 * g).sum().item() for g in gradient(logs["matching"], roles.student.parameters())]
    assert got == pytest.approx(expected(DIVERGENCES[name], alpha, sigma), rel=1e-6)


def test_reverse_kl_is_dmd2():
    losses = []
    for strategy in (FDistill(divergence="reverse_kl", steps=1, guidance=1.0), DMD2(steps=1, guidance=1.0)):
        strategy.head, strategy.averages = Ideal(), Averages(10)
        roles = world(VP, "eps", Mixture())
        _, logs = first(strategy, roles, *SIGNS)
        losses.append(
            [logs["matching"].item(), *(g.sum().item() for g in gradient(logs["matching"], roles.student.parameters()))]
        )
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_weights_have_mean_one_and_no_gradient():
    strategy, logits = FDistill(divergence="forward_kl"), torch.randn(64, 5, requires_grad=True)
    strategy.averages = Averages(10)
    h = strategy.weights(logits.detach(), torch.rand(64))
    assert h.mean().item() == pytest.approx(1, rel=1e-6) and h.std() > 0.1
    roles = world(FLOW, "flow", Mixture())
    strategy = FDistill(divergence="forward_kl", steps=1, guidance=1.0)
    strategy.head, strategy.averages = Ideal(), Averages(10)
    _, logs = first(strategy, roles, *SIGNS)
    assert not logs["most_weight"].requires_grad and logs["most_weight"] > logs["least_weight"]


def test_ratio_is_clamped_and_told_by_the_mean_logit():
    strategy = FDistill(divergence="forward_kl", bins=None)
    logits = torch.tensor([[1.0, -1.0], [math.log(40), math.log(40)], [-9.0, -9.0], [math.log(2), math.log(2)]])
    h = strategy.weights(logits, torch.zeros(4))
    assert (h / h[0]).tolist() == pytest.approx([1, 20, 0.1, 2], rel=1e-6)


def test_ratio_is_divided_by_its_average_at_like_times():
    """Two bins of t_range: each sample's ratio over its bin's mean, which decays with every batch; an empty bin stays."""
    strategy = FDistill(divergence="forward_kl", bins=2, bins_decay=0.25, t_range=(0.4, 0.8))
    strategy.averages = Averages(2)
    log_r = torch.tensor([1.0, 3.0, 8.0, 12.0]).log()[:, None]
    h = strategy.weights(log_r, torch.tensor([0.4, 0.59, 0.61, 0.79]))
    first_bin, second = (1 + 3 * 2) / 4, (1 + 3 * 10) / 4  # averages begin at 1
    want = torch.tensor([1 / first_bin, 3 / first_bin, 8 / second, 12 / second])
    assert torch.allclose(h, want / want.mean())
    strategy.weights(log_r[:2], torch.tensor([0.4, 0.5]))
    assert strategy.averages.value.tolist() == pytest.approx([(first_bin + 3 * 2) / 4, second])
    assert "value" in strategy.averages.state_dict()  # a resumed run remembers


@pytest.mark.parametrize("gan_on", ["fake", "teacher"])
def test_two_time_scales(gan_on):
    strategy = FDistill(steps=1, guidance=1.0, student_every=3, gan_on=gan_on)
    roles = world(FLOW, "flow", Gaussian(M, C), fake=Affine(B, A, 4))
    strategy.setup(roles)
    strategy.head.double()
    x = torch.randn(6, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    batch = Batch(noise=x, cond={}, x0=x.flip(0))
    for step in range(4):
        turns = []
        for who, loss, logs in strategy.losses(roles, batch, Draw(0, step, range(6))):
            assert torch.is_grad_enabled() and loss.isfinite() and all(v.isfinite() for v in logs.values())
            turns.append(who)
            critics = roles.fake.parameters() + list(strategy.head.parameters())
            got = gradient(loss, roles.student.parameters() + critics, allow_unused=True)
            assert (None not in got[:2]) if who == "student" else got[:2] == (None, None)
        assert turns == (["student"] if step % 3 == 0 else []) + ["critic", "critic"]
    assert strategy.players(0) == {"student": ("student",), "critic": ("fake", "head")}


def test_gan_term_is_added_with_its_weight():
    for weight in (0.0, 0.3):
        strategy = FDistill(steps=1, guidance=1.0, gan=weight)
        strategy.head, strategy.averages = Ideal(), Averages(10)
        loss, logs = first(strategy, world(FLOW, "flow", Mixture()), *SIGNS)
        assert loss.item() == pytest.approx((logs["matching"] + weight * logs["gan"]).item(), rel=1e-12)
        a, s = levels(FLOW)  # judged at the x_t, and the times, of the matching
        z, eps = SIGNS
        logits = Ideal()(torch.stack([a * (B + A * z) + s * eps, *(c.expand(T, 4) for c in (a, s))], -1))
        assert logs["gan"].item() == pytest.approx(F.softplus(-logits).mean().item(), rel=1e-9)


def test_inference_and_fields():
    assert [hop.time for hop in FDistill(steps=2).inference(FLOW).hops] == [1.0, 0.5]
    with pytest.raises(ValueError, match="f-distill student of 4 steps cannot take 3"):
        FDistill().inference(VP, 3)
    assert not list(FDistill().check())
    bad = FDistill(times=(0.5, 1.0), t_range=(0.9, 0.1), ratio_range=(2.0, 1.0))
    assert len(list(bad.check())) == 4
