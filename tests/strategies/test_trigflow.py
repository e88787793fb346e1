"""Any teacher as TrigFlow, and the consistency of sCM and rCM there, against closed forms (reference: methods, 0.1 and 7)."""

import pytest
import torch
from torch.autograd import grad as gradient
from worlds import F64, FLOW, PROCESSES, SHIFTED, VP, Consistency, Gaussian, play, spread

from stepdistill.batch import Batch, Draw
from stepdistill.strategies import trigflow
from stepdistill.strategies.trigflow import Points, angle, consistency, derivative, guided, random_angles, seen, turned

M, C = 0.7, 0.5  # the data's mean and spread
EVERY = pytest.mark.parametrize(("schedule", "kind"), PROCESSES)
THETA = torch.tensor([0.05, 0.3, 0.8, 1.2, 1.45], dtype=F64)
X = torch.randn(5, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
COS, SIN = THETA.cos()[:, None], THETA.sin()[:, None]


def world(schedule, kind):
    return play(schedule, kind, Gaussian(M, C), student=Consistency(M, C))


def points(roles, x=X, theta=THETA, scale=1.0, cond=None, null=None):
    return Points(x, theta, guided(roles, x, theta, cond or {}, null, scale), cond or {})


def velocity(x, theta, mean=M):
    """dx/dtheta of N(mean, C^2): cos E[eps | x] - sin E[x0 | x]."""
    cos, sin = theta.cos()[:, None], theta.sin()[:, None]
    x0, eps = Gaussian(mean, C)(x, cos, sin, {})
    return cos * eps - sin * x0


@EVERY
def test_teachers_are_trigflow_at_the_angle_of_their_signal_to_noise_ratio(schedule, kind):
    x_t, t = seen(schedule, X, THETA)
    alpha, sigma = schedule.alpha_sigma(t)
    assert torch.allclose(torch.atan2(sigma, alpha), THETA, rtol=0, atol=1e-12)
    assert torch.allclose(x_t, (alpha**2 + sigma**2).sqrt()[:, None] * X, rtol=0, atol=1e-12)
    roles = world(schedule, kind)
    assert torch.allclose(guided(roles, X, THETA, {}, None, 1.0), velocity(X, THETA), rtol=0, atol=1e-10)
    p = roles.teacher(x_t, t, {})
    assert torch.allclose(COS * X - SIN * p.trig, p.x0, rtol=0, atol=1e-10)  # f = cos x - sin F


def test_rectified_flow_has_the_known_wrap():
    """rCM, Eq. 3: t = sin / (sin + cos), x_t = x / (sin + cos), F = (cos x - x0) / sin."""
    x_t, t = seen(FLOW, X, THETA)
    assert torch.allclose(t, THETA.sin() / (THETA.sin() + THETA.cos()), rtol=0, atol=1e-14)
    assert torch.allclose(x_t, X / (SIN + COS), rtol=0, atol=1e-14)
    p = world(FLOW, "flow").teacher(x_t, t, {})
    assert torch.allclose(p.trig, (COS * X - p.x0) / SIN, rtol=0, atol=1e-12)


@EVERY
def test_a_turn_is_the_teachers_own_first_order_step(schedule, kind):
    roles = world(schedule, kind)
    (x_t, t), to = seen(schedule, X, THETA), THETA - 0.04
    moved = roles.move(roles.teacher(x_t, t, {}), schedule.time(to))
    back = seen(schedule, turned(X, velocity(X, THETA), to - THETA), to)[0]
    assert torch.allclose(moved, back, rtol=0, atol=1e-10)


@EVERY
def test_angles_are_lognormal_inside_the_schedule(schedule, kind):
    u = (torch.arange(4000, dtype=F64) + 0.5) / 4000
    theta = random_angles(schedule, u, (0.7, 4.0))
    low, high = (angle(schedule, t, u) for t in (0.002, 1.0))
    assert theta.min() == low and high - 1e-6 < theta.max() <= high
    inside = (theta > low) & (theta < high)
    z = (theta[inside].tan().log() - 0.7) / 4
    assert torch.allclose(torch.special.ndtr(z), u[inside], rtol=0, atol=1e-9)


@EVERY
def test_exact_student_has_no_tangent(schedule, kind):
    roles = world(schedule, kind)
    error, size = consistency(roles, points(roles), 1.0, 0.1, None)
    assert size.max() < 1e-12 and error.max() < 1e-20


@EVERY
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_below_a_full_share_the_exact_students_tangent_is_known(schedule, kind, share):
    """(1 - r)(-cos^2 (F - dx/dtheta)), since both of its parts cancel at r = 1; the error is what normalization leaves."""
    roles = world(schedule, kind)
    at = points(roles)
    F = roles.student(*seen(schedule, X, THETA), {}).trig
    g = -(1 - share) * COS**2 * (F - velocity(X, THETA))
    size = g.square().mean(1).sqrt()
    error, told = consistency(roles, at, share, 0.1, None)
    assert torch.allclose(told, size, rtol=1e-9, atol=0)
    assert torch.allclose(error, (size / (size + 0.1)) ** 2, rtol=1e-9, atol=0)


@EVERY
def test_gradient_is_minus_the_normalized_tangent(schedule, kind):
    """Of a student of another mean and spread: -2 g / (|g| + c) dF, with g = cos df/dtheta by Richardson differences of f."""
    mean, std = (torch.tensor(x, dtype=F64, requires_grad=True) for x in (0.3, 0.9))
    roles = play(schedule, kind, Gaussian(M, C), student=Consistency(mean, std))
    at = points(roles)
    error, size = consistency(roles, at, 1.0, 0.1, None)
    got = gradient(error.mean(), (mean, std))

    def f(by):
        x, theta = turned(X, at.velocity, torch.full_like(THETA, by)), THETA + by
        return roles.student(*seen(schedule, x, theta), {}).x0

    slope = (8 * (f(1e-3) - f(-1e-3)) - (f(2e-3) - f(-2e-3))) / 12e-3
    g = COS * slope.detach()
    assert torch.allclose(size, g.square().mean(1).sqrt(), rtol=1e-6, atol=0)
    pull = -2 * g / (size.detach()[:, None] + 0.1) / g.numel()
    x0 = roles.student(*seen(schedule, X, THETA), {}).x0
    want = gradient((pull * (COS * X - x0) / SIN).sum(), (mean, std))
    assert [x.item() for x in got] == pytest.approx([x.item() for x in want], rel=1e-5)


@EVERY
def test_finite_differences_are_of_second_order(schedule, kind):
    inner = THETA[1:4]  # on tables theta is linear between entries: away from their ends differences cross many
    roles = play(schedule, kind, Gaussian(M, C), student=Consistency(0.3, 0.9))
    at = points(roles, X[1:4], inner)
    exact = derivative(roles.student, schedule, at, None)
    off = []
    for h in (0.02, 0.01):
        off.append((derivative(roles.student, schedule, at, h) - exact).norm().item())
    assert off[0] < 1e-3 and off[0] / off[1] == pytest.approx(4, rel=0.05)


def test_differences_stay_inside_the_schedule():
    seen_times = []
    roles = world(VP, "eps")
    roles.student.net.register_forward_hook(lambda _n, args, _o: seen_times.append(torch.atan2(args[2], args[1])))
    ends = torch.stack([angle(VP, 0.0, X), angle(VP, 1.0, X)])
    derivative(roles.student, VP, points(roles, X[:2], ends), 0.05)
    asked = torch.cat(seen_times)
    assert asked.min() >= ends[0] - 1e-12 and asked.max() <= ends[1] + 1e-12


@EVERY
def test_the_tangent_follows_the_guided_teacher(schedule, kind):
    """Equal variances: guidance w makes N(m_u + w (m_c - m_u), C^2), whose consistency function has no tangent."""
    cond, null = ({"mean": torch.full((5, 1), m, dtype=F64)} for m in (1.0, -0.5))
    for scale, still in ((3.0, True), (2.0, False)):
        roles = play(schedule, kind, Gaussian(None, C), student=Consistency(-0.5 + 3.0 * 1.5, C))
        size = consistency(roles, points(roles, scale=scale, cond=cond, null=null), 1.0, 0.1, None)[1]
        assert (size.max() < 1e-10) == still


@EVERY
@pytest.mark.parametrize("scale", [1.0, None])
def test_points_on_pictures(schedule, kind, scale):
    """Where they are, and whose velocity they have: the teacher's, or that of the picture and its noise."""
    roles, z = world(schedule, kind), 0.3 * X
    at = trigflow.on_pictures(roles, Batch(noise=X, x0=z, cond={}), Draw(0, 0, range(5)), scale, (0.7, 1.6))
    cos, sin = at.theta.cos()[:, None], at.theta.sin()[:, None]
    assert torch.allclose(at.x, cos * z + sin * X, rtol=0, atol=1e-12) and len(at.theta.unique()) == 5
    want = velocity(at.x, at.theta) if scale else cos * X - sin * z
    assert torch.allclose(at.velocity, want, rtol=0, atol=1e-9)


@EVERY
def test_points_on_trajectories(schedule, kind):
    """The teacher's own way from noise: deviations shrink by the cosines of DDIM steps; velocities are the teacher's there;
    each range of equally likely angles has one point of each trajectory."""
    roles, n = world(schedule, kind), 3
    cond = {"tag": torch.arange(5.0)}
    at = trigflow.on_trajectories(roles, Batch(noise=X, cond=cond), Draw(0, 0, range(5)), 1.0, (0.0, 1.0), n)
    assert at.cond["tag"].tolist() == [*range(5)] * n
    assert torch.allclose(at.velocity, velocity(at.x, at.theta), rtol=0, atol=1e-9)
    u = torch.special.ndtr(at.theta.tan().log()).reshape(n, 5)
    for k, some in enumerate(u):
        assert ((some >= (n - 1 - k) / n - 1e-9) & (some <= (n - k) / n + 1e-9)).all()
    x, theta = X, angle(schedule, 1.0, X).expand(5)
    for there, to in zip(at.x.reshape(n, 5, 4), at.theta.reshape(n, 5), strict=True):
        a, b = (torch.atan2(y.sin(), y.cos() * C)[:, None] for y in (theta, to))
        S = [spread(y.cos(), y.sin(), C)[:, None] for y in (theta, to)]
        x = M * to.cos()[:, None] + (a - b).cos() * S[1] / S[0] * (x - M * theta.cos()[:, None])
        theta = to
        assert torch.allclose(there, x, rtol=0, atol=1e-9)


def test_trajectories_need_no_more_teacher_calls_than_points_and_one():
    asked = []
    roles = world(SHIFTED, "flow")
    roles.teacher.net.register_forward_hook(lambda _n, args, _o: asked.append(len(args[0])))
    trigflow.on_trajectories(roles, Batch(noise=X, cond={}), Draw(0, 0, range(5)), 1.0, (0.0, 1.0), 4)
    assert asked == [5] * 5


def test_unit_of_the_normalization_is_the_root_mean_square():
    """So that c means the same for samples of any size."""
    roles = play(FLOW, "flow", Gaussian(M, C), student=Consistency(0.3, 0.9))
    some = points(roles, X[:, :1], THETA)
    wide = Points(*(y.repeat(1, 9) if y.ndim > 1 else y for y in some[:3]), {})
    for small, large in zip(*(consistency(roles, at, 1.0, 0.1, None) for at in (some, wide)), strict=True):
        assert torch.allclose(small, large, rtol=1e-12, atol=0)


def test_a_law_without_spread_is_a_problem():
    assert list(trigflow.check_proposal((0.7, 0.0))) and not list(trigflow.check_proposal((0.7, 1.6)))
