"""Distribution matching with a regression on pairs, against closed forms (reference: methods, 1)."""

import sys

import pytest
import torch
from matching import EVERY, A, B, C, M, T, U, expected, first, levels, moved, normalizer, world
from torch.autograd import grad as gradient
from worlds import F64, FLOW, SIGNS, VP, Affine, Gaussian, Mixture, Script, pairs, spread

from stepdistill import perceptual
from stepdistill.batch import Batch, Draw
from stepdistill.errors import UserError
from stepdistill.strategies.dmd import DMD

NOISE = torch.tensor([-0.5, 0.3, 1.1, 2.0], dtype=F64)  # of the pairs; new noise and eps are SIGNS
ENDS = torch.tensor([0.4, -1.0, 0.9, 0.2], dtype=F64).expand(T, -1)
HUBER = 0.3


def run(strategy, roles, fresh, eps, u=U, noise=NOISE, ends=None, **batch):
    """The student's loss and logs. Without ends the pairs are what the student makes already."""
    net = roles.student.net
    ends = (net.b + net.a * noise).detach().expand(len(u), -1) if ends is None else ends
    return first(strategy, roles, noise, [fresh, eps], u, x0=ends, **batch)


def regression(b, a):
    """The pseudo-Huber distance of student and pairs, written out, with its slopes in b and a."""
    off = b + a * NOISE - ENDS
    root = (off**2 + HUBER**2).sqrt()
    return (root - HUBER).mean().item(), (off / root).mean().item(), (NOISE * off / root).mean().item()


def closed(roles, teacher, schedule, mean=M):
    """E[(D_q - D_p) dG] over mean |x0 - D_p|: sigma^2 (b - m) / V_p in b, a sigma^2 (1 / V_p - 1 / V_q) in a."""
    a, s = levels(schedule)
    weight = s**2 / normalizer(roles, teacher, a, s, *SIGNS)
    v_p, v_q = spread(a, s, C) ** 2, spread(a, s, A) ** 2
    return [(weight * (B - mean) / v_p).mean().item(), (weight * A * (1 / v_p - 1 / v_q)).mean().item()]


@EVERY
def test_gradient_is_the_closed_form_of_both_terms(schedule, kind):
    """Matching on new noise, and the weighted regression on the pairs' own."""
    roles = world(schedule, kind, teacher := Gaussian(M, C))
    loss, logs = run(DMD(guidance=1.0, regression=0.4, huber=HUBER), roles, *SIGNS, ends=ENDS)
    value, *slopes = regression(B, A)
    want = closed(roles, teacher, schedule)
    assert logs["regression"].item() == pytest.approx(value, rel=1e-12)
    assert loss.item() == pytest.approx(logs["matching"].item() + 0.4 * value, rel=1e-12)
    assert moved(loss, roles) == pytest.approx([x + 0.4 * y for x, y in zip(want, slopes, strict=True)], rel=1e-9)


@pytest.mark.parametrize(("schedule", "kind"), [(VP, "eps"), (FLOW, "flow")])
@pytest.mark.parametrize("at", [0.35, 0.6, 0.9])
def test_mixture_gradient_is_that_of_the_divergence(schedule, kind, at):
    """alpha^2 / sigma^2 times the matching's gradient, normalizer undone, is that of KL(q_t | p_t)."""
    z, eps, w = pairs(96)
    roles = world(schedule, kind, teacher := Mixture(), size=len(z))
    strategy = DMD(guidance=1.0, t_range=(0.0, 1.0))
    _, logs = run(strategy, roles, z, eps, u := torch.tensor([at], dtype=F64), noise=z.flip(0))
    alpha, sigma = (c[:, None] for c in schedule.alpha_sigma(u))
    scale = normalizer(roles, teacher, alpha, sigma, z, eps) * alpha**2 / sigma**2 * len(z)
    got = [(w * scale * g).sum().item() for g in gradient(logs["matching"], roles.student.parameters())]
    assert got == pytest.approx(expected(lambda log_r: -log_r, alpha, sigma), rel=1e-6)


@EVERY
def test_pairs_of_the_exact_ode_and_the_teacher_s_samples_are_the_fixed_point(schedule, kind):
    """From pure noise z the ODE of N(m, c^2) ends at m + c z: there both terms rest. At a = -c, where matching rests as
    well, the regression does not: it is what chooses."""
    ends = (M + C * NOISE).expand(T, -1)
    roles = world(schedule, kind, Gaussian(M, C), b=M, a=C)
    loss, logs = run(DMD(guidance=1.0), roles, *SIGNS, ends=ends)
    assert all(g.abs().max() < 1e-9 for g in gradient(loss, roles.student.parameters()))
    assert logs["regression"].item() == pytest.approx(0, abs=1e-12)
    roles = world(schedule, kind, Gaussian(M, C), b=M, a=-C)
    _, logs = run(DMD(guidance=1.0), roles, *SIGNS, ends=ends)
    assert all(abs(x) < 1e-9 for x in moved(logs["matching"], roles)) and abs(moved(logs["regression"], roles)[1]) > 0.5


@EVERY
def test_only_the_teacher_is_guided(schedule, kind):
    """Guidance 4 between N(1, c^2) and N(-0.5, c^2) moves the target's mean to 5.5; the fake sees no null prompt. Neither
    keeps a graph."""
    seen, mean = [], -0.5 + 4 * 1.5
    fake = Gaussian(B, A)
    fake.register_forward_hook(lambda _net, args, _out: seen.append((len(args[0]), args[3], torch.is_grad_enabled())))
    cond, null = ({"mean": torch.full((T, 1), m, dtype=F64)} for m in (1.0, -0.5))
    roles = world(schedule, kind, Gaussian(None, C), fake=fake)
    _, logs = run(DMD(guidance=4.0), roles, *SIGNS, cond=cond, null=null)
    assert seen == [(T, cond, False)]
    assert moved(logs["matching"], roles) == pytest.approx(closed(roles, Gaussian(mean, C), schedule, mean), rel=1e-9)


@EVERY
@pytest.mark.parametrize("space", [None, "x0"])
def test_fake_learns_the_new_samples_detached(schedule, kind, space):
    """Its loss is the posterior's variance a^2 sigma^2 / V in x0, times the weight of its space, and stationary there: so
    of N(b, a^2), not of the pairs' ends."""
    mean, std = (torch.tensor(x, dtype=F64, requires_grad=True) for x in (B, A))
    roles = world(schedule, kind, Gaussian(M, C), fake=Gaussian(mean, std))
    draw, batch = Script(uniform=U, normal=[*SIGNS, SIGNS[1]]), Batch(NOISE.expand(T, -1), {}, x0=ENDS)
    *_, (who, loss, logs) = DMD(guidance=1.0, fake_loss=space).losses(roles, batch, draw)
    a, s = levels(schedule, 0.002, 0.998)
    weight = {"x0": 1 + 0 * a, "eps": (a / s) ** 2, "v": (a**2 / s + s) ** 2, "flow": (a / s + 1) ** 2}[space or kind]
    assert who == "critic" and logs == {"denoising": loss}
    assert loss.item() == pytest.approx((weight * A**2 * s**2 / spread(a, s, A) ** 2).mean().item(), rel=1e-9)
    assert all(abs(g.item()) < 1e-9 * loss.item() for g in gradient(loss, (mean, std)))


def test_who_moves():
    strategy, roles = DMD(guidance=1.0), world(VP, "eps", Gaussian(M, C), fake=Affine(B, A, 4))
    assert strategy.needs == {"pairs"} and strategy.players(0) == {"student": ("student",), "critic": ("fake",)}
    asked = []
    roles.student.net.register_forward_hook(lambda _net, args, _out: asked.append(args[0]))
    x = torch.randn(6, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    for step in range(2):
        turns = []
        for who, loss, _ in strategy.losses(roles, Batch(noise=x, cond={}, x0=x.flip(0)), Draw(0, step, range(6))):
            turns.append(who)
            mine, other = (roles.student, roles.fake) if who == "student" else (roles.fake, roles.student)
            got = gradient(loss, mine.parameters() + other.parameters(), allow_unused=True)
            assert None not in got[:2] and got[2:] == (None, None)
        assert turns == ["student", "critic"]
    new, own = asked[::2], asked[1::2]
    assert all(torch.equal(z, x) for z in own) and not any((z == x).any() for z in new) and not torch.equal(*new)


def test_lpips_is_of_decoded_pictures_with_gradient(package):
    """A decoder that triples: the distance is 2 mean (3 (x0 - end))^2."""
    roles = world(FLOW, "flow", Gaussian(M, C))
    roles._family.decode = lambda x0: 3 * x0
    strategy = DMD(guidance=1.0, distance="lpips", regression=0.4)
    assert not list(strategy.check())
    loss, logs = run(strategy, roles, *SIGNS, ends=ENDS)
    off = B + A * NOISE - ENDS
    assert logs["regression"].item() == pytest.approx(18 * off.square().mean().item(), rel=1e-12)
    slopes = [36 * off.mean().item(), 36 * (NOISE * off).mean().item()]
    assert moved(logs["regression"], roles) == pytest.approx(slopes, rel=1e-12)
    assert loss.item() == pytest.approx((logs["matching"] + 0.4 * logs["regression"]).item(), rel=1e-12)
    net = perceptual.network(NOISE.device)
    assert net is perceptual.network(NOISE.device) and not any(p.requires_grad for p in net.parameters())


def test_without_the_package_lpips_is_refused_before_any_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)  # an import of it fails
    monkeypatch.setattr(perceptual, "installed", lambda: False)
    perceptual.network.cache_clear()
    [said] = DMD(distance="lpips").check()
    assert said.startswith("distance: ") and "pip install 'stepdistill[lpips]', or set distance to huber" in said
    with pytest.raises(UserError, match="needs the package lpips, which is not installed; install it"):
        perceptual.lpips(NOISE, NOISE)


def test_whether_the_package_is_there_is_found_without_importing_it(package, monkeypatch):
    assert perceptual.installed()
    monkeypatch.delitem(sys.modules, "lpips")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not perceptual.installed()


def test_inference():
    assert [hop.time for hop in DMD().inference(VP).hops] == [1.0] and DMD().inference(VP, 1) == DMD().inference(VP)
    with pytest.raises(ValueError, match="set steps to 1"):
        DMD().inference(VP, 4)


def test_fields_are_checked_together():
    assert not list(DMD().check()) and len(list(DMD(t_range=(0.9, 0.1)).check())) == 1
