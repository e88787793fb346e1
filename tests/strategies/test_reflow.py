"""Rectified flow of pairs against closed forms (reference: methods, 12): of N(m, c^2), whose ODE takes z to m + c z, and of a
mixture in one dimension, whose ODE is the monotone map."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.autograd import grad as gradient
from worlds import F64, FLOW, PROCESSES, SD_SCHEDULER, VP, Gaussian, Mixture, Script, play

from stepdistill import perceptual
from stepdistill.batch import Batch, Draw
from stepdistill.samplers import find_sampler
from stepdistill.sampling import Inference, sample, trailing
from stepdistill.strategies.reflow import Reflow, along

M, C = 0.7, 0.5  # the data's mean and spread
Z = torch.tensor([-1.5, -0.4, 0.3, 2.0], dtype=F64)  # the noise of every pair
TAU = torch.tensor([0.1, 0.3, 0.5, 0.75, 1.0], dtype=F64)  # shares of the chord, a sample at each
T, D = len(TAU), len(Z)
EVERY = pytest.mark.parametrize(("schedule", "kind"), PROCESSES)
ONE = torch.ones(1, dtype=F64)


class Straight(nn.Module):
    """Predicts b + a z wherever the chord of the pair (z, m + c z) passes; with a = c, b = m the fixed point."""

    def __init__(self, schedule, b=M, a=C):
        super().__init__()
        self.b, self.a = (nn.Parameter(torch.tensor(x, dtype=F64)) for x in (b, a))
        self.noisiest = [x.item() for x in schedule.alpha_sigma(ONE)]

    def forward(self, x_t, alpha, sigma, cond):
        alpha_1, sigma_1 = self.noisiest
        share = sigma / sigma_1  # x_t = (alpha - share alpha_1) x0 + share z
        rest = alpha - share * alpha_1
        x0 = self.b + self.a * (x_t - rest * M) / (rest * C + share)
        return x0, (x_t - alpha * x0) / sigma


def batch(z=Z, x0=None):
    return Batch(noise=z.expand(T, -1), cond={}, x0=(M + C * z if x0 is None else x0).expand(T, -1))


def run(roles, b=None, step=0, **fields):
    """The loss and logs, drawn at TAU."""
    draw = Script(step=step, uniform=1 - TAU)
    ((who, loss, logs),) = Reflow(**{"u_shape": 0.0, **fields}).losses(roles, b or batch(), draw)
    assert who == "student"
    return loss, logs


def rho(schedule, tau=TAU):
    """The time sigma / (alpha + sigma) of rectified flow [T, 1] at shares tau."""
    alpha, sigma = (x[:, None] for x in schedule.alpha_sigma(along(schedule, tau)))
    return sigma / (alpha + sigma)


@EVERY
def test_the_chord_is_straight_and_begins_in_the_noise_itself(schedule, kind):
    """In rectified-flow coordinates x_t / (alpha + sigma); and tau is how far along it a point lies, by equal steps."""
    seen = []
    student = Straight(schedule)
    student.register_forward_hook(lambda _net, args, _out: seen.append(args[:3]))
    run(play(schedule, kind, Gaussian(M, C), student=student))
    ((x_t, alpha, sigma),) = seen
    x0, y_1 = batch().x0, Z / sum(schedule.alpha_sigma(ONE))
    clean = rho(schedule, 0 * ONE) / rho(schedule, ONE)  # how far along it a table's clean end already is; 0 on flow
    torch.testing.assert_close(x_t[-1], Z, rtol=0, atol=1e-10)
    torch.testing.assert_close(
        x_t / (alpha + sigma), x0 + (clean + (1 - clean) * TAU[:, None]) * (y_1 - x0), rtol=0, atol=1e-10
    )
    assert along(schedule, TAU)[-1].item() == pytest.approx(1, abs=1e-12)
    assert along(schedule, 0 * ONE).item() == pytest.approx(0, abs=1e-12)


@EVERY
@pytest.mark.parametrize("distance", ["l2", "huber"])
def test_straight_student_has_no_loss_and_any_number_of_steps_is_exact(schedule, kind, distance):
    roles = play(schedule, kind, Gaussian(M, C), student=Straight(schedule))
    assert run(roles, distance=distance)[0].item() < 1e-10
    for steps in (1, 2, 5):
        made = sample(roles, Reflow().inference(schedule, steps), batch().noise, {})
        torch.testing.assert_close(made, batch().x0, rtol=0, atol=1e-10)


@EVERY
def test_loss_and_gradient_of_a_wrong_student(schedule, kind):
    """Off by e = b - m + (a - c) z in x0 it is off by -e / rho in flow: of l2 the mean square; of the pseudo-Huber distance
    (sqrt(|e / rho|^2 + (huber d)^2) - huber d) / d a sample."""
    b, a, huber = 0.4, 0.9, 0.2
    e, r = b - M + (a - C) * Z, rho(schedule)
    root = ((e / r).square().sum(1) + (huber * D) ** 2).sqrt()[:, None]  # [T, 1]
    want = {
        "l2": ((e / r).square().mean(), 2 * e / r**2 / D),
        "huber": ((root / D - huber).mean(), e / r**2 / root / D),
    }
    for distance, (value, slope) in want.items():
        student = Straight(schedule, b, a)
        loss, logs = run(play(schedule, kind, Gaussian(M, C), student=student), distance=distance, huber=huber)
        assert logs == {"flow": loss} and loss.item() == pytest.approx(value.item(), rel=1e-9)
        got = [g.item() for g in gradient(loss, (student.b, student.a))]
        assert got == pytest.approx([slope.sum(1).mean().item(), (Z * slope).sum(1).mean().item()], rel=1e-8)


def test_the_teacher_itself_bends():
    """Before it is rectified: one Euler step from noise takes it to its mean, whatever the noise; and as a student it misses
    the chord, in x0, by (a c^2 (a c + s) / (a^2 c^2 + s^2) - c) z."""
    roles = play(FLOW, "flow", Gaussian(M, C), student=Gaussian(M, C))
    made = sample(roles, Reflow().inference(FLOW), batch().noise, {})
    torch.testing.assert_close(made, torch.full_like(made, M))
    s = TAU[:, None]
    off = ((1 - s) * C**2 * ((1 - s) * C + s) / ((1 - s) ** 2 * C**2 + s**2) - C) * Z
    assert run(roles, distance="l2")[0].item() == pytest.approx((off / s).square().mean().item(), rel=1e-9)


@EVERY
def test_mixture_is_rectified_by_its_monotone_map(schedule, kind):
    """p and z belong together where F(p) = Phi(z); on their chord a bisection finds p, and that student has no loss."""

    def noise_of(p):
        return torch.special.ndtri(sum(w * torch.special.ndtr((p - g.mean) / g.std) for w, g in Mixture().parts))

    class Monotone(Straight):
        def forward(self, x_t, alpha, sigma, cond):
            low, high = torch.full_like(x_t, -4.0), torch.full_like(x_t, 4.0)
            share = sigma / self.noisiest[1]
            for _ in range(60):
                p = (low + high) / 2
                over = (alpha - share * self.noisiest[0]) * p + share * noise_of(p) > x_t
                low, high = torch.where(over, low, p), torch.where(over, p, high)
            return p, (x_t - alpha * p) / sigma

    ends = torch.tensor([-2.0, -0.9, 0.1, 1.5], dtype=F64)
    b = batch(noise_of(ends), ends)
    roles = play(schedule, kind, Mixture(), student=Monotone(schedule))
    assert run(roles, b, distance="l2")[0].item() < 1e-10
    made = sample(roles, Reflow().inference(schedule), b.noise, {})
    torch.testing.assert_close(made, b.x0, rtol=0, atol=1e-8)
    assert run(play(schedule, kind, Mixture(), student=Straight(schedule)), b, distance="l2")[0].item() > 0.1


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_ddim_on_a_table_is_euler_of_rectified_flow(steps):
    """At matched signal-to-noise, in y = x / (alpha + sigma), of any network at all."""
    how = Inference(trailing(VP.grid(steps), "teacher"), renoise=False)
    x = torch.randn(8, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    ddim = sample(play(VP, "eps", Mixture()), how, x, {})
    levels = [[c.item() for c in VP.alpha_sigma(ONE * hop.time)] for hop in how.hops]
    times = [s / (a + s) for a, s in levels] + [0.0]
    y = x / sum(levels[0])
    for here, there in itertools.pairwise(times):
        scale = math.hypot(1 - here, here)  # the table's alpha^2 + sigma^2 is 1
        x0, eps = Mixture()(y / scale, ONE * (1 - here) / scale, ONE * here / scale, {})
        y = y + (there - here) * (eps - x0)
    torch.testing.assert_close(y, ddim, rtol=0, atol=1e-12)


def test_stock_ddim_serves_it():
    for steps in (1, 2, 4, 5, 8):
        how = Reflow().inference(VP, steps)
        assert not how.renoise and len(how.hops) == steps
        assert find_sampler(VP, "eps", SD_SCHEDULER, how).scheduler == "DDIMScheduler"
    assert [hop.time for hop in Reflow(steps=3).inference(FLOW).hops] == pytest.approx([1, 2 / 3, 1 / 3])


def shares_of(schedule, n, **fields):
    """The shares tau at which a student is asked, with the real Draw."""
    seen = []
    student = Straight(schedule)
    student.register_forward_hook(lambda _net, args, _out: seen.append(args[2] / (args[1] + args[2])))
    x = torch.zeros(n, 1, dtype=F64)
    list(
        Reflow(**fields).losses(
            play(schedule, "flow", Gaussian(M, C), student=student), Batch(x, {}, x0=x), Draw(0, 0, range(n))
        )
    )
    clean, noise = (rho(schedule, end * ONE).item() for end in (0, 1))
    return (seen[0].flatten() - clean) / (noise - clean)


def distribution(tau, a):
    """The integral of rf++'s density e^(a tau) + e^(a (1 - tau)), normalized."""
    return (torch.expm1(a * tau) + math.exp(a) - (a * (1 - tau)).exp()) / (2 * math.expm1(a))


def kolmogorov_smirnov(tau, law):
    """The largest distance of an empirical distribution function from a law, times the root of its size."""
    n, want = len(tau), law(tau.sort().values)
    steps = torch.arange(n + 1, dtype=F64) / n
    return max((steps[1:] - want).max().item(), (want - steps[:-1]).max().item()) * math.sqrt(n)


@pytest.mark.parametrize("schedule", [VP, FLOW])
@pytest.mark.parametrize("a", [4.0, 8.0])
def test_times_follow_their_law(schedule, a):
    """1.63 is exceeded in one of a hundred samples of the law; the seed is fixed."""
    tau = shares_of(schedule, 1500, u_shape=a)
    assert kolmogorov_smirnov(tau, lambda x: distribution(x, a)) < 1.63
    assert kolmogorov_smirnov(tau, lambda x: x) > 1.63  # and uniform times do not
    assert tau.min() > 0 and tau.max() <= 1 + 1e-7 and tau.mean().item() == pytest.approx(0.5, abs=0.03)
    u = torch.linspace(0, 1, 101, dtype=F64)
    torch.testing.assert_close(distribution(Reflow(u_shape=a).drawn(u), a), u, rtol=0, atol=1e-12)


def test_uniform_times_are_the_law_s_limit():
    assert kolmogorov_smirnov(shares_of(FLOW, 1500, u_shape=0.0), lambda x: x) < 1.63
    u = torch.linspace(0, 1, 101, dtype=F64)
    torch.testing.assert_close(Reflow(u_shape=1e-4).drawn(u), u, rtol=0, atol=1e-8)


@EVERY
def test_distillation_is_of_one_step_from_the_noise_itself(schedule, kind):
    """There the loss is that of the sample, times (alpha + sigma) / sigma in flow."""
    strategy = Reflow(reflow_steps=3)
    assert [strategy.stage(step) for step in (0, 2, 3, 100)] == [0, 0, 1, 1] and strategy.stages == 2
    assert Reflow().stage(10**6) == 0 and Reflow().stages == 1 and Reflow(reflow_steps=0).stage(0) == 1
    seen, b, a = [], 0.4, 0.9
    student = Straight(schedule, b, a)
    student.register_forward_hook(lambda _net, args, out: seen.append((args[0], out[0])))
    roles = play(schedule, kind, Gaussian(M, C), student=student)
    early, _ = run(roles, step=2, distance="l2", reflow_steps=3)
    last, _ = run(roles, step=3, distance="l2", reflow_steps=3)
    assert early.item() == pytest.approx(run(roles, distance="l2")[0].item(), rel=1e-12) and early != last
    x_t, made = seen[1]
    torch.testing.assert_close(x_t, Z.expand(T, -1), rtol=0, atol=1e-10)
    alpha, sigma = schedule.alpha_sigma(ONE)
    assert last.item() == pytest.approx(((alpha / sigma + 1) ** 2 * (made - batch().x0).square().mean()).item(), rel=1e-9)


def test_lpips_huber(package):
    """(1 - tau) of the pseudo-Huber distance, and LPIPS of decoded predictions, here 2 mean (3 (x0 - end))^2; in distillation
    LPIPS alone. divide_lpips weighs it by 1 / tau."""
    b, a, huber = 0.4, 0.9, 0.2
    student = Straight(FLOW, b, a)
    roles = play(FLOW, "flow", Gaussian(M, C), student=student)
    roles._family.decode = lambda x0: 3 * x0
    e, s = b - M + (a - C) * Z, TAU
    flow = (1 - s) * (((e.square().sum() / s**2 + (huber * D) ** 2).sqrt()) / D - huber)
    fields = {"distance": "lpips_huber", "huber": huber}
    for divided, weight in ((False, torch.ones(T)), (True, 1 / s)):
        assert not list(Reflow(**fields, divide_lpips=divided).check())
        loss, logs = run(roles, **fields, divide_lpips=divided)
        assert logs["flow"].item() == pytest.approx(flow.mean().item(), rel=1e-9)
        assert logs["lpips"].item() == pytest.approx(18 * (weight.mean() * e.square().mean()).item(), rel=1e-9)
        assert loss.item() == pytest.approx(sum(logs.values()).item(), rel=1e-12)
        (slope,) = gradient(logs["lpips"], student.b)
        assert slope.item() == pytest.approx(36 * (weight.mean() * e.mean()).item(), rel=1e-9)
    loss, logs = run(roles, **fields, reflow_steps=0)
    assert logs["flow"] == 0 and loss.item() == pytest.approx(18 * e.square().mean().item(), rel=1e-9)


def test_fields_are_checked_together(monkeypatch):
    monkeypatch.setattr(perceptual, "installed", lambda: False)
    assert not list(Reflow().check()) and not list(Reflow(steps=4).check())
    told = "\n".join(Reflow(distance="lpips_huber").check())
    assert told.startswith("distance: ") and "pip install 'stepdistill[lpips]', or set distance to huber" in told
    assert "set distance to lpips_huber" in "\n".join(Reflow(divide_lpips=True).check())
    assert Reflow().needs == {"pairs"} and Reflow().roles == ("student",)
