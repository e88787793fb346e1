"""Latent consistency distillation against closed forms in Gaussian worlds (reference: methods, part 5)."""

import pytest
import torch
from torch.autograd import grad as gradient
from worlds import F64, FLOW, PROCESSES, SIGNS, VP, Consistency, Gaussian, Script, Solver, play, spread

from stepdistill.batch import Batch, Draw
from stepdistill.diffusion import like
from stepdistill.strategies import lcm
from stepdistill.strategies.lcm import LCM

M, C, N = 0.7, 0.5, 12  # the data's mean and spread; points of the grid
EVERY = pytest.mark.parametrize(("schedule", "kind"), [*PROCESSES, (FLOW, "x0")])
SKIPS = pytest.mark.parametrize("skip", [1, 3, N])
Z, E = (x.expand(N, 4) for x in SIGNS)


def batch(mean=M, **kw):
    """One sample for every point of the grid; its four entries are nodes of an exact expectation over x0 and eps."""
    return Batch(noise=E, x0=mean + C * Z, **{"cond": {}, **kw})


def script(guidance=0.5):
    return Script(integer=torch.arange(1, N + 1), uniform=torch.full((N,), guidance, dtype=F64))


def times(schedule, skip):
    """The pairs t and s [N] of the whole grid."""
    grid = torch.tensor(schedule.grid(N), dtype=F64)
    return grid[1:], grid[(torch.arange(1, N + 1) - skip).clamp(min=0)]


def jump(schedule, skip):
    t, s = times(schedule, skip)
    return lambda asked: s[(asked[:, None] - t).abs().argmin(1)]


def end(schedule):
    """The coefficients at time 0, where trajectories end: on DDPM tables a little noise is left."""
    return [c.item() for c in schedule.alpha_sigma(torch.zeros(1, dtype=F64))]


def residual(schedule, skip):
    """(1 - cos dphi) and xi = S_0 / S_t (x_t - alpha m), both [N, 1 or 4]: what one DDIM step misses, and on what."""
    t, s = times(schedule, skip)
    (a_t, s_t), (a_s, s_s) = ([like(c, Z) for c in schedule.alpha_sigma(x)] for x in (t, s))
    turn = torch.atan2(s_t, a_t * C) - torch.atan2(s_s, a_s * C)
    return turn.cos(), spread(*end(schedule), C) / spread(a_t, s_t, C) * (a_t * C * Z + s_t * E)


def run(strategy, roles, b, draw=None):
    ((player, loss, logs),) = strategy.losses(roles, b, draw or script())
    assert player == "student" and logs["consistency"] is loss
    return loss


@EVERY
@SKIPS
def test_exact_student_of_an_exact_solver_has_no_loss(schedule, kind, skip):
    strategy = LCM(grid=N, skip=skip, guidance=(1.0, 1.0), huber=1e-12)  # so the loss is the mean absolute residual
    teacher = Solver(M, C, schedule, jump(schedule, skip))

    def loss(**wrong):
        student = Consistency(M, C, end(schedule), **wrong)
        return run(strategy, play(schedule, kind, teacher, student=student), batch(null={})).item()

    assert loss() < 1e-10
    assert loss(gain=1.001) > 1e-5 and loss(shift=1e-3) > 1e-5 / N


@EVERY
@SKIPS
def test_ddim_step_leaves_the_known_residual(schedule, kind, skip, monkeypatch):
    """E |f(x_t) - f(x_s)|^2 = S_0^2 (1 - cos dphi)^2 an entry, and the pseudo-Huber distance of it entry by entry."""
    roles = play(schedule, kind, Gaussian(M, C), student=Consistency(M, C, end(schedule)))
    cos, xi = residual(schedule, skip)
    loss = run(LCM(grid=N, skip=skip, huber=0.03), roles, batch(null={}))
    want = ((((1 - cos) * xi) ** 2 + 0.03**2).sqrt() - 0.03).mean()
    assert loss.item() == pytest.approx(want.item(), rel=1e-9)

    monkeypatch.setattr(lcm, "pseudo_huber", lambda a, b, c: (a - b).square().mean())
    loss = run(LCM(grid=N, skip=skip), roles, batch(null={}))
    want = (spread(*end(schedule), C) ** 2 * (1 - cos) ** 2).mean()
    assert loss.item() == pytest.approx(want.item(), rel=1e-9)


class Shrunk(Consistency):
    """The consistency function, its deviations from the mean shrunk by a factor for every point of the grid."""

    def __init__(self, schedule, factors):
        super().__init__(M, C, end(schedule))
        self.grid, self.factors, self.schedule = torch.tensor(schedule.grid(N), dtype=F64), factors, schedule

    def forward(self, x_t, a, s, cond):
        t = self.schedule.time(torch.atan2(s, a).flatten())
        x0 = self.end[0] * M + self.factors[(t[:, None] - self.grid).abs().argmin(1)][:, None] * (
            super().forward(x_t, a, s, cond)[0] - self.end[0] * M
        )
        return x0, (x_t - a * x0) / s.clamp(min=1e-300)


@EVERY
@pytest.mark.parametrize("skip", [1, 3])
def test_what_ddim_steps_miss_is_learnt(schedule, kind, skip):
    """The fixed point of a first-order solver shrinks by the product of its steps' cosines: LCM's own loss of contrast."""
    cos = residual(schedule, skip)[0].flatten()
    factors = torch.ones(N + 1, dtype=F64)
    for n in range(1, N + 1):
        factors[n] = cos[n - 1] * factors[max(n - skip, 0)]
    strategy = LCM(grid=N, skip=skip, guidance=(1.0, 1.0), huber=1e-12)
    exact, shrunk = (
        run(strategy, play(schedule, kind, Gaussian(M, C), student=Shrunk(schedule, some)), batch(null={})).item()
        for some in (torch.ones_like(factors), factors)
    )
    assert shrunk < 1e-10 and exact > 1e-3


def test_of_stable_diffusion_at_50_steps_the_loss_of_contrast_is_known():
    t = torch.tensor(VP.grid(50), dtype=F64)
    for spread_of_data, left in ((0.5, 0.951), (1.0, 0.973)):
        angles = torch.atan2(VP.alpha_sigma(t)[1], VP.alpha_sigma(t)[0] * spread_of_data)
        assert (angles[1:] - angles[:-1]).cos().prod().item() == pytest.approx(left, abs=6e-4)


@EVERY
@SKIPS
@pytest.mark.parametrize("ema", [None, 0.95])
def test_gradient_stops_at_the_target(schedule, kind, skip, ema):
    """A student gain f + shift against gain' cos f + shift' of its target, or x_s itself where s = 0."""
    gain, shift = (torch.tensor(x, dtype=F64, requires_grad=True) for x in (1.2, 0.3))
    nets = {"student": Consistency(M, C, end(schedule), gain, shift)}
    if ema is not None:
        nets["target"] = Consistency(M, C, end(schedule), 0.8, -0.1)
    strategy = LCM(grid=N, skip=skip, huber=0.05, ema=ema)
    got = gradient(run(strategy, play(schedule, kind, Gaussian(M, C), **nets), batch(null={})), (gain, shift))

    cos, xi = residual(schedule, skip)
    g, h = (1.2, 0.3) if ema is None else (0.8, -0.1)
    target = torch.where(times(schedule, skip)[1][:, None] == 0, cos * xi, g * cos * xi + h)
    r = 1.2 * xi + 0.3 - target
    slope = r / (r**2 + 0.05**2).sqrt()
    assert got[0].item() == pytest.approx((slope * xi).mean().item(), rel=1e-9)
    assert got[1].item() == pytest.approx(slope.mean().item(), rel=1e-9)


class Told(Consistency):
    """A student that knows how the told guidance scale moves the mean from -0.5 (null) towards 1.0 (cond)."""

    def forward(self, x_t, a, s, cond):
        w = like(cond["guidance"], x_t) if "guidance" in cond else 1.0
        return super().forward(x_t, a, s, {"mean": -0.5 + w * 1.5})


@EVERY
def test_guided_teacher_is_the_teacher_of_the_shifted_mean(schedule, kind):
    """Equal variances: guidance w makes N(m_u + w (m_c - m_u), c^2), which a student that is told w follows exactly."""
    scale = torch.linspace(0, 1, N, dtype=F64)
    means = {name: {"mean": torch.full((N, 1), m, dtype=F64)} for name, m in (("cond", 1.0), ("null", -0.5))}
    strategy = LCM(grid=N, guidance=(2.0, 6.0), huber=1e-12, embed_guidance=3.0)
    roles = play(schedule, kind, Solver(None, C, schedule, jump(schedule, 1)), student=Told(None, C, end(schedule)))
    draw = Script(integer=torch.arange(1, N + 1), uniform=scale)
    mean = -0.5 + (2 + 4 * scale[:, None]) * 1.5
    assert run(strategy, roles, batch(mean, **means), draw).item() < 1e-9
    strategy.embed_guidance = None  # not told: the same student is wrong
    assert run(strategy, roles, batch(mean, **means), Script(**draw.numbers)).item() > 0.1


def test_unguided_lcm_works_without_a_null_prompt():
    """A guidance-distilled teacher has none; with guidance [1, 1] nothing needs it."""
    roles = play(FLOW, "flow", Gaussian(M, C), student=Consistency(M, C))
    assert run(LCM(grid=N, guidance=(1.0, 1.0)), roles, batch(null=None)) > 0
    with pytest.raises(ValueError, match="set guidance to 1"):
        run(LCM(grid=N, guidance=(1.0, 2.0)), roles, batch(null=None))


def test_real_draws_cover_the_whole_grid():
    """No stand-in here: points 1..N are drawn, never 0, each with its own partner."""
    asked = []

    class Spy(Gaussian):
        def forward(self, x_t, a, s, cond):
            asked.append(VP.time(torch.atan2(s, a).flatten())[: len(x_t) // 2])
            return super().forward(x_t, a, s, cond)

    roles = play(VP, "eps", Spy(M, C), student=Consistency(M, C))
    x = torch.randn(400, 4, generator=torch.Generator().manual_seed(0))
    run(LCM(grid=N), roles, Batch(noise=x, x0=x, cond={}, null={}), Draw(0, 0, range(400)))
    assert (asked[0] * 999).round().unique().tolist() == [round(t * 999) for t in VP.grid(N)[1:]]


def test_inference_visits_the_trailing_grid():
    how = LCM(steps=4).inference(VP)
    assert [round(hop.time * 999) for hop in how.hops] == [999, 749, 499, 249]
    assert how.renoise and how.guidance is None and {hop.role for hop in how.hops} == {"student"}
    assert not LCM().inference(FLOW).renoise and LCM(renoise=True).inference(FLOW).renoise
    assert LCM(embed_guidance=7.5).inference(VP).guidance == 7.5
    assert [round(hop.time * 999) for hop in LCM(steps=4).inference(VP, 1).hops] == [999]


def test_fields_are_checked_together():
    assert not list(LCM().check())
    assert len(list(LCM(skip=51, guidance=(6.0, 2.0)).check())) == 2
