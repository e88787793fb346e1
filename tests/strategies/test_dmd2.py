"""Improved distribution matching against closed forms, in worlds whose scores are known (reference: methods, 1, 2)."""

import pytest
import torch
from matching import EVERY, A, B, C, Ideal, M, T, U, expected, first, levels, moved, normalizer, softened, world
from torch import nn
from torch.autograd import grad as gradient
from worlds import F64, FLOW, SIGNS, VP, Affine, Gaussian, Mixture, Script, pairs, play, spread

from stepdistill.batch import Batch, Draw
from stepdistill.strategies import dmd2
from stepdistill.strategies.dmd2 import DMD2


@EVERY
def test_gradient_is_the_closed_form(schedule, kind):
    """E[(D_q - D_p) dG] is sigma^2 (b - m) / V_p in b and a sigma^2 (1 / V_p - 1 / V_q) in a."""
    z, eps = SIGNS
    roles = world(schedule, kind, teacher := Gaussian(M, C))
    loss, _ = first(DMD2(steps=1, guidance=1.0), roles, z, eps)
    got = moved(loss, roles)
    a, s = levels(schedule)
    weight = s**2 / normalizer(roles, teacher, a, s, z, eps)
    v_p, v_q = spread(a, s, C) ** 2, spread(a, s, A) ** 2
    assert got[0] == pytest.approx((weight * (B - M) / v_p).mean().item(), rel=1e-9)
    assert got[1] == pytest.approx((weight * A * (1 / v_p - 1 / v_q)).mean().item(), rel=1e-9)


@EVERY
@pytest.mark.parametrize("sign", [1, -1])
def test_teacher_s_own_samples_are_the_fixed_point(schedule, kind, sign):
    roles = world(schedule, kind, Gaussian(M, C), b=M, a=sign * C)
    loss, _ = first(DMD2(steps=1, guidance=1.0), roles, *SIGNS)
    for g in gradient(loss, roles.student.parameters()):
        assert g.abs().max() < 1e-9


@EVERY
def test_only_the_teacher_is_guided(schedule, kind):
    """Guidance 4 between N(1, c^2) and N(-0.5, c^2) moves the target's mean to 5.5; the fake sees no null prompt."""
    seen, mean = [], -0.5 + 4 * 1.5
    fake = Gaussian(B, A)
    fake.register_forward_hook(lambda _net, args, _out: seen.append((len(args[0]), args[3])))
    cond, null = ({"mean": torch.full((T, 1), m, dtype=F64)} for m in (1.0, -0.5))
    roles = world(schedule, kind, Gaussian(None, C), fake=fake)
    loss, _ = first(DMD2(steps=1, guidance=4.0), roles, *SIGNS, cond=cond, null=null)
    assert seen == [(T, cond)]
    got = moved(loss, roles)
    a, s = levels(schedule)
    weight = s**2 / normalizer(roles, Gaussian(mean, C), a, s, *SIGNS)
    v_p, v_q = spread(a, s, C) ** 2, spread(a, s, A) ** 2
    assert got[0] == pytest.approx((weight * (B - mean) / v_p).mean().item(), rel=1e-9)
    assert got[1] == pytest.approx((weight * A * (1 / v_p - 1 / v_q)).mean().item(), rel=1e-9)


@pytest.mark.parametrize(("schedule", "kind"), [(VP, "eps"), (FLOW, "flow")])
@pytest.mark.parametrize("at", [0.35, 0.6, 0.9])
def test_mixture_gradient_is_that_of_the_divergence(schedule, kind, at):
    """alpha^2 / sigma^2 times the loss's gradient, normalizer undone, is that of KL(q_t | p_t)."""
    z, eps, w = pairs(96)
    roles = world(schedule, kind, teacher := Mixture(), size=len(z))
    strategy = DMD2(steps=1, guidance=1.0, t_range=(0.0, 1.0))
    loss, _ = first(strategy, roles, z, eps, u := torch.tensor([at], dtype=F64))
    alpha, sigma = (c[:, None] for c in schedule.alpha_sigma(u))
    scale = normalizer(roles, teacher, alpha, sigma, z, eps) * alpha**2 / sigma**2 * len(z)
    got = [(w * scale * g).sum().item() for g in gradient(loss, roles.student.parameters())]
    assert got == pytest.approx(expected(lambda log_r: -log_r, alpha, sigma), rel=1e-6)


@pytest.mark.parametrize(("schedule", "kind"), [(VP, "eps"), (FLOW, "flow")])
@pytest.mark.parametrize("gan_on", ["fake", "teacher"])
@pytest.mark.parametrize("at", [0.35, 0.9])
def test_gan_gradient_at_the_optimal_logit(schedule, kind, gan_on, at):
    """E[1 / (1 + r) alpha (s_q - s_p) dG], which is the gradient of the softened reverse KL."""
    z, eps, w = pairs(96)
    roles = world(schedule, kind, Mixture(), size=len(z))
    strategy = DMD2(steps=1, guidance=1.0, gan=0.3, gan_on=gan_on)
    strategy.setup(roles)
    assert strategy.head(torch.zeros(2, 5, 3)).shape == (2, 5)
    strategy.head = Ideal()
    asked = []
    for name, role in roles.items():
        role.net.register_forward_hook(lambda _net, _args, _out, name=name: asked.append(name))
    loss, logs = first(strategy, roles, z, eps, u := torch.tensor([at], dtype=F64))
    assert sorted(asked) == sorted(["student", "teacher", "fake", gan_on])  # whose features the head reads
    assert loss.item() == pytest.approx((logs["matching"] + 0.3 * logs["gan"]).item(), rel=1e-12)

    alpha, sigma = (c[:, None] for c in schedule.alpha_sigma(0.002 + 0.996 * u))
    got = [(w * g).sum().item() * len(z) for g in gradient(logs["gan"], roles.student.parameters())]
    assert got == pytest.approx(expected(softened, alpha, sigma), rel=1e-6)


@pytest.mark.parametrize("gan", [0.0, 0.3])
@pytest.mark.parametrize("alternate", [False, True])
def test_two_time_scales(gan, alternate):
    strategy = DMD2(steps=1, guidance=1.0, gan=gan, alternate=alternate, student_every=3)
    roles = world(FLOW, "flow", Gaussian(M, C), fake=Affine(B, A, 4))
    strategy.setup(roles)
    assert strategy.needs == ({"x0"} if gan else frozenset())  # data-free without a discriminator
    assert strategy.players(0) == {"student": ("student",), "critic": ("fake", "head") if gan else ("fake",)}
    x = torch.randn(6, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    batch = Batch(noise=x, cond={}, x0=x.flip(0) if gan else None)
    critic, recorded = ["critic", "critic"] if gan else ["critic"], []
    roles.student.net.register_forward_hook(lambda _net, _args, out: recorded.append(out[0].requires_grad))
    for step in range(7):
        if gan:
            strategy.head.double()
        turns = []
        for who, loss, logs in strategy.losses(roles, batch, Draw(0, step, range(6))):
            assert torch.is_grad_enabled() and loss.isfinite() and all(v.isfinite() for v in logs.values())
            turns.append(who)
            critics = roles.fake.parameters() + (list(strategy.head.parameters()) if gan else [])
            got = gradient(loss, roles.student.parameters() + critics, allow_unused=True)
            if who == "student":
                assert None not in got[:2]
            else:  # the critic never teaches the student
                assert got[:2] == (None, None) and any(g is not None for g in got[2:])
        turn = step % 3 == 0
        assert recorded.pop() == turn and not recorded  # no graph of the student is kept for the critic alone
        assert turns == (["student"] if turn else []) + ([] if turn and alternate else critic)


def test_critic_learns_from_the_samples_that_the_student_was_judged_on(monkeypatch):
    seen = {}
    for name, at in (("distribution_matching", 0), ("fit_fake", 1)):
        real = getattr(dmd2, name)
        monkeypatch.setattr(dmd2, name, lambda *a, r=real, n=name, k=at: seen.update({n: a[k]}) or r(*a))
    roles = world(VP, "eps", Gaussian(M, C))
    x = torch.randn(6, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    list(DMD2(guidance=1.0).losses(roles, Batch(noise=x, cond={}), Draw(0, 0, range(6))))
    assert torch.equal(seen["distribution_matching"], seen["fit_fake"])
    assert seen["distribution_matching"].requires_grad and not seen["fit_fake"].requires_grad


def test_discriminator_s_loss_is_weighted_and_sees_real_and_fake():
    """A head that tells x_t: with eps 0, real 3 and fake B + A 0 at the one time drawn."""
    roles, strategy = world(FLOW, "flow", Gaussian(M, C)), DMD2(steps=1, guidance=1.0, gan=0.3, gan_critic=0.25)
    strategy.head = type("Tell", (nn.Module,), {"forward": lambda self, tokens: tokens[..., 0]})()
    zeros = torch.zeros(T, 4, dtype=F64)
    draw = Script(step=1, uniform=torch.full((T,), 0.5, dtype=F64), normal=zeros[0])
    *_, (who, loss, logs) = strategy.losses(roles, Batch(noise=zeros, cond={}, x0=zeros + 3), draw)
    assert who == "critic" and logs["real"].item() == pytest.approx(1.5) and logs["fake"].item() == pytest.approx(B / 2)
    want = (1 + (-logs["real"]).exp()).log() + (1 + logs["fake"].exp()).log()
    assert logs["gan"].item() == pytest.approx(want.item()) and loss.item() == pytest.approx(want.item() / 4)


def gain(schedule, time):
    """The slope of Gaussian(M, C) as a student at a time, and alpha, sigma there."""
    a, s = (c.item() for c in schedule.alpha_sigma(torch.tensor([time], dtype=F64)))
    return a * C**2 / spread(a, s, C) ** 2, a, s


@EVERY
@pytest.mark.parametrize("exit_hop", range(4))
def test_backward_simulation_follows_the_variance_recursion(schedule, kind, exit_hop):
    """Noises are unit vectors, so x_t holds their coefficients (means aside) and its squared norm is its variance."""
    seen, axes = [], torch.eye(6, dtype=F64)
    student = Gaussian(nn.Parameter(torch.tensor(0.0, dtype=F64)), C)  # each step an affine map, not exact
    student.register_forward_hook(lambda _net, args, out: seen.append((args[0], out[0].requires_grad)))
    roles, strategy = play(schedule, kind, Gaussian(M, C), student=student), DMD2(renoise=True)
    draw = Script(normal=[axes[i : i + 1] for i in range(1, 6)], choice=exit_hop)
    how = strategy.inference(schedule)
    p, time = dmd2.generate(roles, how, Batch(noise=axes[:1], cond={}), draw, grad=True)

    variance = 1.0  # pure noise, also where alpha at the last time is not 0
    for i, hop in enumerate(how.hops[: exit_hop + 1]):
        k, _, _ = gain(schedule, hop.time)
        x_t, trained = seen[i]
        assert x_t.square().sum().item() == pytest.approx(variance, rel=1e-9) and trained == (i == exit_hop)
        clean = k**2 * variance
        if i < exit_hop:
            _, a, s = gain(schedule, how.hops[i + 1].time)
            variance = a**2 * clean + s**2
            assert abs(variance / spread(a, s, C) ** 2 - 1) > 1e-3  # not what noised data would be
    assert len(seen) == exit_hop + 1 and time == how.hops[exit_hop].time
    assert p.x0.square().sum().item() == pytest.approx(clean, rel=1e-9)
    assert draw.served["normal"] == exit_hop


@EVERY
def test_deterministic_simulation_is_a_product_of_cosines(schedule, kind):
    """Without new noise each DDIM or Euler step contracts by cos dphi against the exact trajectory."""
    roles, strategy = play(schedule, kind, Gaussian(M, C), student=Gaussian(M, C)), DMD2(renoise=False)
    how = strategy.inference(schedule)
    z = torch.tensor([[-1.0, 0.0, 2.0]], dtype=F64)
    p, _ = dmd2.generate(roles, how, Batch(noise=z, cond={}), Script(choice=3), grad=False)
    points = [schedule.alpha_sigma(torch.tensor([hop.time], dtype=F64)) for hop in how.hops]
    angles = torch.stack([torch.atan2(s, a * C) for a, s in points])
    (a_0, s_0), (a_3, s_3) = points[0], points[-1]
    x_3 = a_3 * M + angles.diff(dim=0).cos().prod() * spread(a_3, s_3, C) / spread(a_0, s_0, C) * (z - a_0 * M)
    assert torch.allclose(p.x0, Gaussian(M, C)(x_3, a_3, s_3, {})[0], rtol=1e-9)


@EVERY
@pytest.mark.parametrize("space", [None, "eps", "x0", "v", "flow"])
def test_best_fake_is_the_exact_score(schedule, kind, space):
    """Over fakes of N(mean, std^2) the loss is stationary at the student's own b and a, where it is the posterior's
    variance a^2 sigma^2 / V in x0 (times the weight of its space), and larger beside it."""
    z, eps = SIGNS
    x0 = (B + A * z).expand(T, -1)

    def loss(mean, std):
        roles = world(schedule, kind, Gaussian(M, C), fake=Gaussian(mean, std))
        return dmd2.fit_fake(roles, x0, {}, Script(uniform=U, normal=eps), space)

    mean, std = (torch.tensor(x, dtype=F64, requires_grad=True) for x in (B, A))
    best = loss(mean, std)
    a, s = levels(schedule, 0.002, 0.998)
    weight = {"x0": 1 + 0 * a, "eps": (a / s) ** 2, "v": (a**2 / s + s) ** 2, "flow": (a / s + 1) ** 2}[space or kind]
    assert best.item() == pytest.approx((weight * A**2 * s**2 / spread(a, s, A) ** 2).mean().item(), rel=1e-9)
    assert all(abs(g.item()) < 1e-9 * best.item() for g in gradient(best, (mean, std)))
    assert all(loss(*x) > best for x in ((B + 0.1, A), (B - 0.1, A), (B, A + 0.1), (B, A - 0.1)))


def test_fake_learns_at_every_time_of_the_open_interval():
    seen = []
    fake = Gaussian(B, A)
    fake.register_forward_hook(lambda _net, args, _out: seen.append(FLOW.time(torch.atan2(args[2], args[1]))))
    roles, x = world(FLOW, "flow", Gaussian(M, C), fake=fake), torch.zeros(2000, 1)
    dmd2.fit_fake(roles, x, {}, Draw(0, 0, range(2000)))
    assert seen[0].min() > 0 and seen[0].max() < 1 and torch.histc(seen[0], 10, 0, 1).min() > 140


@EVERY
def test_without_normalizer_the_gradient_is_the_difference(schedule, kind):
    """sigma^2 (b - m) / V_p in b, a sigma^2 (1 / V_p - 1 / V_q) in a, each time weighing by itself."""
    roles = world(schedule, kind, Gaussian(M, C))
    loss, _ = first(DMD2(steps=1, guidance=1.0, normalize=False), roles, *SIGNS)
    a, s = levels(schedule)
    v_p, v_q = spread(a, s, C) ** 2, spread(a, s, A) ** 2
    want = [(s**2 * (B - M) / v_p).mean().item(), (s**2 * A * (1 / v_p - 1 / v_q)).mean().item()]
    assert moved(loss, roles) == pytest.approx(want, rel=1e-9)


def test_inference():
    times = [round(hop.time * 999) for hop in DMD2().inference(VP).hops]
    assert times == [999, 749, 499, 249] and DMD2().inference(VP).renoise and not DMD2().inference(FLOW).renoise
    assert [round(hop.time * 999) for hop in DMD2().inference(VP, 2).hops] == [999, 499]
    assert [hop.time for hop in DMD2(steps=2, times=(1.0, 0.4)).inference(FLOW).hops] == [1.0, 0.4]
    for steps in (3, 8):
        with pytest.raises(ValueError, match="use a divisor of 4"):
            DMD2().inference(VP, steps)


def test_fields_are_checked_together():
    assert not list(DMD2().check()) and not list(DMD2(steps=2, times=(1.0, 0.5)).check())
    assert len(list(DMD2(times=(0.5, 1.0), t_range=(0.9, 0.1), alternate=True, student_every=1).check())) == 4
