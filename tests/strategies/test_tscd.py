"""Trajectory-segmented consistency distillation against closed forms in Gaussian worlds (reference: methods, part 6)."""

import pytest
import torch
from diffusers import TCDScheduler
from torch import nn
from torch.autograd import grad as gradient
from worlds import F64, FLOW, PROCESSES, SD_SCHEDULER, SHIFTED, SIGNS, VP, Affine, Gaussian, Script, Solver, play, spread

from stepdistill.batch import Batch, Draw
from stepdistill.diffusion import like
from stepdistill.sampling import Inference, sample, trailing
from stepdistill.strategies import TSCD, shared

M, C, N = 0.7, 0.5, 12  # the data's mean and spread; points of the grid
EVERY = pytest.mark.parametrize(("schedule", "kind"), [*PROCESSES, (FLOW, "x0")])
SEGMENTS = pytest.mark.parametrize("segments", [N, 4, 1])
Z, E = (x.expand(N, 4) for x in SIGNS)
ENDS = {  # number of segments -> the end of each interval's segment, as points of the grid
    12: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
    6: [0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10],
    4: [0, 0, 0, 3, 3, 3, 6, 6, 6, 9, 9, 9],
    2: [0, 0, 0, 0, 0, 0, 6, 6, 6, 6, 6, 6],
    1: [0] * 12,
}


def only(segments, **fields):
    """The strategy in a single stage of so many segments."""
    return TSCD(**{"segments": (segments,), "mix": (0.0,), "grid": N, "guidance": (1.0, 1.0), **fields})


def batch(mean=M, **kw):
    """One sample for every point of the grid; its four entries are nodes of an exact expectation over x0 and eps."""
    return Batch(noise=E, x0=mean + C * Z, **{"cond": {}, "null": None, **kw})


def script(**numbers):
    return Script(**{"integer": torch.arange(1, N + 1), "uniform": torch.full((N,), 0.5, dtype=F64), **numbers})


def grid(schedule):
    return torch.tensor(schedule.grid(N), dtype=F64)


def before(schedule):
    """The jump of an exact solver: to the next point of the grid."""
    times = grid(schedule)
    return lambda asked: times[(asked[:, None] - times[1:]).abs().argmin(1)]


def end(schedule, segments):
    """The jump of an exact student: to where its segment ends."""
    times = grid(schedule)
    return lambda asked: times[ENDS[segments]][(asked[:, None] - times[1:]).abs().argmin(1)]


def levels(schedule, segments):
    """alpha and sigma [N, 1] of the points, of the next ones, and of their segments' ends."""
    times = grid(schedule)
    return [[like(c, Z) for c in schedule.alpha_sigma(x)] for x in (times[1:], times[:-1], times[ENDS[segments]])]


def residual(schedule, segments):
    """cos dphi [N, 1] by which one DDIM step falls short, and xi [N, 4]: where trajectories end, off alpha m."""
    (a, s), (a_s, s_s), to = levels(schedule, segments)
    turn = torch.atan2(s, a * C) - torch.atan2(s_s, a_s * C)
    return turn.cos(), spread(*to, C) / spread(a, s, C) * (a * C * Z + s * E)


def run(strategy, roles, b, draw=None):
    ((player, loss, logs),) = strategy.losses(roles, b, draw or script())
    assert player == "student" and logs["consistency"] is loss
    return loss


@EVERY
@pytest.mark.parametrize("stage", range(5))
def test_segments_end_where_they_should(schedule, kind, stage):
    strategy = TSCD(segments=(12, 6, 4, 2, 1), stage_steps=10, grid=N, mix=(0.0,) * 5, guidance=(1.0, 1.0))
    segments = strategy.segments[stage]
    roles = play(schedule, kind, Gaussian(M, C), student=Gaussian(M, C))
    y, target, found = strategy.pair(roles, batch(), script(), segments)
    assert found.tolist() == grid(schedule)[ENDS[segments]].tolist()
    assert y.shape == target.shape == Z.shape
    whole = run(strategy, roles, batch(), script(step=10 * stage + 9))
    assert whole.item() == pytest.approx((y - target).square().mean().item(), rel=1e-12)  # that stage is in force


@EVERY
@SEGMENTS
@pytest.mark.parametrize("ema", [None, 0.95])
def test_exact_student_of_an_exact_solver_has_no_loss(schedule, kind, segments, ema):
    """Also where the target's own time is the segment's end, and sigma 0."""
    jump, nets = end(schedule, segments), {}
    if ema is not None:
        nets["target"] = Solver(M, C, schedule, jump)

    def loss(**wrong):
        student = Solver(M, C, schedule, jump, **wrong)
        roles = play(schedule, kind, Solver(M, C, schedule, before(schedule)), student=student, **nets)
        return run(only(segments, ema=ema), roles, batch()).item()

    assert loss() < 1e-18
    assert loss(gain=1.01) > 1e-7 and loss(shift=1e-3) > 1e-8


@EVERY
@SEGMENTS
def test_ddim_step_leaves_the_known_residual(schedule, kind, segments):
    """E |y - target|^2 = S_end^2 (1 - cos dphi)^2 an entry."""
    roles = play(schedule, kind, Gaussian(M, C), student=Solver(M, C, schedule, end(schedule, segments)))
    cos, _ = residual(schedule, segments)
    want = (spread(*levels(schedule, segments)[2], C) ** 2 * (1 - cos) ** 2).mean()
    assert run(only(segments), roles, batch()).item() == pytest.approx(want.item(), rel=1e-9)


@EVERY
@SEGMENTS
@pytest.mark.parametrize("ema", [None, 0.95])
def test_gradient_stops_at_the_target(schedule, kind, segments, ema):
    """A student gain xi + shift against gain' cos xi + shift' of its target, or cos xi where that is the segment's end."""
    gain, shift = (torch.tensor(x, dtype=F64, requires_grad=True) for x in (1.2, 0.3))
    jump, nets = end(schedule, segments), {}
    if ema is not None:
        nets["target"] = Solver(M, C, schedule, jump, 0.8, -0.1)
    nets["student"] = Solver(M, C, schedule, jump, gain, shift)
    loss = run(only(segments, ema=ema), play(schedule, kind, Gaussian(M, C), **nets), batch())
    got = gradient(loss, (gain, shift))

    cos, xi = residual(schedule, segments)
    g, h = (1.2, 0.3) if ema is None else (0.8, -0.1)
    boundary = torch.arange(N)[:, None] == torch.tensor(ENDS[segments])[:, None]
    r = 1.2 * xi + 0.3 - torch.where(boundary, cos * xi, g * cos * xi + h)
    assert loss.item() == pytest.approx((r**2).mean().item(), rel=1e-9)
    assert got[0].item() == pytest.approx((2 * r * xi).mean().item(), rel=1e-9)
    assert got[1].item() == pytest.approx((2 * r).mean().item(), rel=1e-9)


class Line(nn.Module):
    """A student of one gain for each sample: x0 = M + kappa (x_t - alpha M)."""

    def __init__(self, kappa):
        super().__init__()
        self.kappa = nn.Parameter(kappa)

    def forward(self, x_t, a, s, cond):
        x0 = M + self.kappa * (x_t - a * M)
        return x0, (x_t - a * x0) / s


@pytest.mark.parametrize(("schedule", "kind"), PROCESSES)
def test_the_optimum_lies_between_denoiser_and_consistency_function(schedule, kind):
    """The loss is a parabola in each kappa; its lowest point is (S_e / S_t - s_e / s_t) / (a_e - a_t s_e / s_t). It is the
    denoiser's a c^2 / S^2 where the segment is short, and the consistency function's c / S where it is the whole."""
    found = {}
    for segments in ENDS:
        jump = end(schedule, segments)
        nets = {"student": Line(torch.full((N, 1), 0.5, dtype=F64)), "target": Solver(M, C, schedule, jump)}
        roles = play(schedule, kind, Solver(M, C, schedule, before(schedule)), **nets)
        kappa = roles.student.net.kappa
        (slope,) = gradient(run(only(segments, ema=0.9), roles, batch()), kappa, create_graph=True)
        (bend,) = gradient(slope.sum(), kappa)
        found[segments] = (kappa - slope / bend).detach()
        (a, s), _, (a_e, s_e) = levels(schedule, segments)
        want = (spread(a_e, s_e, C) / spread(a, s, C) - s_e / s) / (a_e - a * s_e / s)
        assert torch.allclose(found[segments], want, rtol=1e-9)
    (a, s), _, _ = levels(schedule, 1)
    denoiser, consistency = a * C**2 / spread(a, s, C) ** 2, C / spread(a, s, C)
    some = slice(6, None)  # points with noise: near data the two are the same
    order = torch.stack([denoiser, *(found[segments] for segments in (12, 4, 2, 1))])[:, some]  # ever longer ones
    assert (order.diff(dim=0) > -1e-12).all()
    end_of_all = schedule.alpha_sigma(torch.zeros(1, dtype=F64))[1].item()  # on DDPM tables a little noise is left
    assert torch.allclose(found[1], consistency, rtol=0, atol=end_of_all + 1e-12)
    assert (found[N] - denoiser)[some].abs().max() < 0.4 * (found[1] - denoiser)[some].abs().max()


@EVERY
def test_the_target_is_of_the_guided_teacher(schedule, kind):
    """Equal variances: guidance w makes N(m_u + w (m_c - m_u), c^2)."""
    scale = torch.linspace(0, 1, N, dtype=F64)
    cond, null = ({"mean": torch.full((N, 1), m, dtype=F64)} for m in (1.0, -0.5))
    mean = -0.5 + (2 + 4 * scale[:, None]) * 1.5

    class Told(Solver):
        def forward(self, x_t, a, s, cond):
            return super().forward(x_t, a, s, {"mean": mean})

    nets = {"student": Told(None, C, schedule, end(schedule, 4))}
    roles = play(schedule, kind, Solver(None, C, schedule, before(schedule)), **nets)
    strategy, b = only(4, guidance=(2.0, 6.0)), batch(mean, cond=cond, null=null)
    assert run(strategy, roles, b, script(uniform=scale)).item() < 1e-18
    assert run(strategy, roles, b, script(uniform=1 - scale)).item() > 1e-3


class Reader(nn.Module):
    """A discriminator that keeps what it reads, tokens [x_t, alpha, sigma], and says weight times x_t."""

    def __init__(self):
        super().__init__()
        self.weight, self.read = nn.Parameter(torch.tensor(0.5, dtype=F64)), []

    def forward(self, tokens):
        self.read.append([x.detach() for x in tokens.unbind(-1)])
        return self.weight * tokens[..., 0]


@EVERY
@SEGMENTS
def test_the_discriminator_tells_target_from_student(schedule, kind, segments):
    """Both are noised on from the segment's end, by q(x_t | x_end), to times above it. The student's loss is the mix; the
    critic's reaches the discriminator alone."""
    u = torch.linspace(0, 1, N, dtype=F64)
    eps = [torch.full((4,), x, dtype=F64) for x in (0.3, -0.4, 0.5)]  # of the student's own, of the target's, of the student's
    nets = {"student": Affine(0.3, 0.9, 4)}
    roles, strategy = play(schedule, kind, Gaussian(M, C), **nets), only(segments, mix=(0.25,))
    strategy.head = Reader()
    # guidance draws from uniform first
    draw = script(uniform=u, normal=eps)
    y, target, e = strategy.pair(roles, batch(), script(uniform=u), segments)
    (who, loss, logs), (critic, its, its_logs) = strategy.losses(roles, batch(), draw)
    assert (who, critic) == ("student", "critic")

    a_e, s_e = levels(schedule, segments)[2]
    least = torch.tensor([schedule.unwarp(t) for t in e.tolist()], dtype=F64)
    t = schedule.warp(least + (1 - least) * (0.002 + 0.996 * u))
    a, s = (like(c, Z) for c in schedule.alpha_sigma(t))
    step = (s**2 - (a / a_e * s_e) ** 2).sqrt()
    want = [a / a_e * x + step * z for x, z in zip((y, target, y), eps, strict=True)]
    for (x_t, alpha, sigma), x in zip(strategy.head.read, want, strict=True):
        assert torch.allclose(x_t, x, rtol=1e-9, atol=1e-12)
        assert torch.allclose(alpha, a.expand_as(x)) and torch.allclose(sigma, s.expand_as(x))

    softplus = nn.functional.softplus
    gan = softplus(-0.5 * want[0]).mean()
    assert logs["gan"].item() == pytest.approx(gan.item(), rel=1e-9)
    assert loss.item() == pytest.approx((0.75 * (y - target).square().mean() + 0.25 * gan).item(), rel=1e-9)
    ours = gradient(loss, roles.student.parameters())
    theirs = gradient(0.75 * (y - target).square().mean() + 0.25 * gan, roles.student.parameters())
    assert all(torch.allclose(p, q, rtol=1e-9) for p, q in zip(ours, theirs, strict=True))
    assert its.item() == pytest.approx((softplus(-0.5 * want[1]) + softplus(0.5 * want[2])).mean().item(), rel=1e-9)
    assert its_logs["gan"] == its
    everyone = [strategy.head.weight, *roles.student.parameters()]
    head, *student = gradient(its, everyone, allow_unused=True)
    assert head.abs() > 0.01 and student == [None, None]


@pytest.mark.parametrize("schedule", [VP, FLOW, SHIFTED])
def test_clean_samples_are_read_as_ever(schedule):
    """No time to have been noised since: bit for bit the marginal of clean samples, at times of the whole range."""
    roles = play(schedule, "v", Gaussian(M, C))
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    got = shared.logits(lambda tokens: tokens, "teacher", roles, x, {}, Draw(0, 0, range(5)))
    draw = Draw(0, 0, range(5))
    t = schedule.warp(draw.uniform(0.002, 0.998))
    a, s = (like(c, x) for c in schedule.alpha_sigma(t))
    assert torch.equal(got[..., 0], a * x + s * draw.normal(x))


def test_real_draws_cover_the_whole_grid():
    roles = play(VP, "eps", Gaussian(M, C), student=Gaussian(M, C))
    x = torch.randn(400, 4, generator=torch.Generator().manual_seed(0))
    _, _, ends = only(4).pair(roles, Batch(noise=x, x0=x, cond={}), Draw(0, 0, range(400)), 4)
    assert (ends * 999).round().unique().tolist() == [0, 249, 499, 749]


@pytest.mark.parametrize("segments", [1, 4])
def test_tcd_scheduler_on_the_exact_student_ends_on_the_trajectory(segments):
    """With eta 0 and as many steps as segments: at timestep 0, where SD still has some noise."""
    roles = play(VP, "eps", Gaussian(M, C), student=Solver(M, C, VP, end(VP, segments)))
    noise = torch.randn(3, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    (a, s), (a_0, s_0) = ([c.item() for c in VP.alpha_sigma(torch.tensor([t], dtype=F64))] for t in (1.0, 0.0))
    exact = a_0 * M + spread(a_0, s_0, C) / spread(a, s, C) * (noise - a * M)
    how = Inference(trailing(VP.grid(segments)), eta=0.0)
    assert torch.allclose(sample(roles, how, noise, {}), exact, rtol=1e-9)

    stock, x = TCDScheduler(**SD_SCHEDULER, original_inference_steps=1000), noise
    stock.set_timesteps(segments)
    for k in stock.timesteps:
        t = torch.full([3], k.item() / 999, dtype=F64)
        x = stock.step(roles.student.family.forward(roles.student.net, x, t, {}), k, x, eta=0.0, return_dict=False)[0]
    assert torch.allclose(x, exact, rtol=0, atol=1e-5)
