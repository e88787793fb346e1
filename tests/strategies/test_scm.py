"""sCM and iCT against closed forms in Gaussian worlds (reference: methods, part 7); their maths is tested in test_trigflow."""

import math

import pytest
import torch
from torch.autograd import grad as gradient
from worlds import F64, FLOW, PROCESSES, VP, Consistency, Gaussian, Script, play, spread

from stepdistill.batch import Batch
from stepdistill.strategies.scm import SCM, Errors
from stepdistill.strategies.trigflow import angle, seen, turned

M, C, N = 0.7, 0.5, 5  # the data's mean and spread; samples
EVERY = pytest.mark.parametrize(("schedule", "kind"), PROCESSES)
U = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=F64)
LAW = (0.0, 1.0)
THETA = torch.special.ndtri(U).exp().atan()  # well inside of every schedule
Z, E = torch.randn(2, N, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
X0 = M + C * Z


def made(**kw):
    return SCM(**{"guidance": 1.0, "proposal": LAW, "warmup": 0, "adaptive": False, "difference": None, **kw})


def run(strategy, roles, step=0, **batch):
    """The loss and the logs of the samples above at the angles above."""
    strategy.setup(roles)
    given = Batch(**{"noise": E, "x0": X0, "cond": {}, **batch})
    ((player, loss, logs),) = strategy.losses(roles, given, Script(step, uniform=U))
    assert player == "student"
    return loss, {name: value.item() for name, value in logs.items()}


def world(schedule, kind, **wrong):
    return play(schedule, kind, Gaussian(M, C), student=Consistency(M, C, **wrong))


def states():
    """Where the pictures are at their angles, [N, 4], with cos and sin [N, 1]."""
    cos, sin = THETA.cos()[:, None], THETA.sin()[:, None]
    return cos * X0 + sin * E, cos, sin


@EVERY
def test_exact_student_of_the_teacher_has_no_tangent(schedule, kind):
    loss, logs = run(made(), world(schedule, kind))
    assert loss.item() < 1e-20 and logs["tangent"] < 1e-11


@EVERY
def test_warm_up_scales_the_derivative_alone(schedule, kind):
    """At iteration 30 of 100 the exact student's tangent is 0.7 times -cos^2 (F - dx/dtheta)."""
    roles = world(schedule, kind)
    x, cos, sin = states()
    x0, eps = Gaussian(M, C)(x, cos, sin, {})
    F = roles.student(*seen(schedule, x, THETA), {}).trig
    g = 0.7 * cos**2 * (F - (cos * eps - sin * x0))
    logs = run(made(warmup=100), roles, step=30)[1]
    assert logs["tangent"] == pytest.approx(g.square().mean(1).sqrt().mean().item(), rel=1e-8)
    assert run(made(warmup=100), roles, step=100)[1]["tangent"] < 1e-11
    assert run(made(warmup=100), roles, step=250)[1]["tangent"] < 1e-11


@EVERY
def test_training_without_a_teacher_has_its_tangent_in_expectation(schedule, kind):
    """With a picture's own velocity, g is linear in it, and its mean over all pictures of one x is the teacher's: the exact
    student is a fixed point. Antithetic pairs (x0, eps) of the posterior at x have that mean exactly."""
    x, cos, sin = states()
    x0, eps = Gaussian(M, C)(x, cos, sin, {})
    off = 0.3 * Z
    roles = world(schedule, kind)
    tangents = []
    for sign in (1, -1):  # cos x0 + sin eps stays x
        at = {"x0": x0 + sign * off, "noise": eps - sign * off * cos / sin}
        strategy = made(velocity="data", tangent=1e9)  # normalization off: the gradient is that of g
        parameter = torch.zeros(N, 4, dtype=F64, requires_grad=True)
        roles = play(schedule, kind, Gaussian(M, C), student=Consistency(M, C, shift=parameter))
        loss = run(strategy, roles, **at)[0]
        tangents.append(gradient(loss, parameter)[0] * 1e9)
    assert tangents[0].abs().max() > 1e-3
    assert (tangents[0] + tangents[1]).abs().max() < 1e-8


@EVERY
def test_the_students_own_trajectories_need_no_pictures(schedule, kind):
    strategy = made(trajectory=3)
    assert strategy.needs == frozenset() and made().needs == {"x0"}
    loss, logs = run(strategy, world(schedule, kind), x0=None)
    assert loss.item() < 1e-18 and logs["tangent"] < 1e-10


def test_adaptive_weights():
    """exp(-w) error / tan + w is least where w is the logarithm of error / tan; at first w is 0 or nearly so."""
    errors = Errors().double()
    error = torch.tensor([0.5, 2.0], dtype=F64)
    theta = torch.tensor([0.4, 1.1], dtype=F64)
    bias = errors.layers[-1].bias
    for k in range(2):
        with torch.no_grad():
            bias.fill_((error[k] / theta[k].tan()).log())
        assert gradient(errors(theta[k : k + 1], error[k : k + 1]).sum(), bias)[0].abs() < 1e-12
    with torch.no_grad():
        bias.fill_(0.3)
    want = math.exp(-0.3) * error / theta.tan() + 0.3
    assert torch.allclose(errors(theta, error), want, rtol=1e-12, atol=0)
    strategy, roles = made(adaptive=True), world(FLOW, "flow")
    strategy.setup(roles)
    assert strategy.players(0) == {"student": ("student", "errors")} and strategy.modules() == {"errors": strategy.errors}
    strategy.errors.double()
    given = Batch(noise=E, x0=X0, cond={})
    ((_, loss, logs),) = strategy.losses(play(FLOW, "flow", Gaussian(M, C), student=Gaussian(M, C)), given, Script(uniform=U))
    assert (
        loss.item() != pytest.approx(logs["consistency"].item()) and len(gradient(loss, [*strategy.errors.parameters()])) == 4
    )
    top = Errors()(torch.tensor([math.pi / 2]), torch.tensor([0.5]))  # in float32
    assert top.isfinite().all()
    assert not made().modules() and made().players(0) == {"student": ("student",)}


def discrete(intervals, **kw):
    return made(intervals=intervals, huber=1e-13, **kw)  # so that the distance is the root mean square


@EVERY
@pytest.mark.parametrize("step", [0, 250])
def test_discrete_time_leaves_the_residual_of_a_first_order_step(schedule, kind, step):
    """|f(x) - f(x one interval lower)| = (1 - cos dphi) S_0 / S |x - cos m|, phi = atan2(sin, C cos), over the interval; from
    8 intervals that double every 100 iterations to 32 at most."""
    n = {0: 8, 250: 32}[step]
    loss, _ = run(discrete((8, 100), double_every=100), world(schedule, kind), step=step)
    x, cos, sin = states()
    delta = angle(schedule, 1.0, THETA) / n
    assert (THETA - delta > 0.06)[1:].all()  # all but the first end above time 0
    low = torch.where(THETA - delta < angle(schedule, 0.002, THETA), 0.0, THETA - delta)
    turn = torch.atan2(sin, C * cos)[:, 0] - torch.atan2(low.sin(), C * low.cos())
    deviation = C / spread(cos, sin, C) * (x - cos * M)
    want = (1 - turn.cos()) * deviation.square().mean(1).sqrt() / (THETA - low)
    assert loss.item() == pytest.approx(want.mean().item(), rel=1e-6)


@EVERY
def test_intervals_double_until_their_last_number(schedule, kind):
    losses = [run(discrete((4, 16), double_every=10), world(schedule, kind), step=k)[0].item() for k in (0, 9, 10, 20, 500)]
    assert losses[0] == losses[1] > losses[2] > losses[3] == losses[4]


def test_in_discrete_time_a_trajectory_ends_in_the_clean_sample():
    """Where the interval reaches past time 0 the target is the picture itself, whatever the student says."""
    roles = world(FLOW, "flow", shift=5.0)
    parameter = torch.tensor(5.0, dtype=F64, requires_grad=True)
    roles.student.net.shift = parameter
    loss, _ = run(discrete((1, 1), velocity="data"), roles)  # one interval: all end there
    x, cos, sin = states()
    f = M + C / spread(cos, sin, C) * (x - cos * M) + 5.0
    want = ((f - X0).square().mean(1).sqrt() / THETA).mean()
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    assert gradient(loss, parameter)[0].item() > 0.1


def test_in_discrete_time_the_lower_point_is_the_target_and_gets_no_gradient():
    parameter = torch.tensor(0.4, dtype=F64, requires_grad=True)
    net = Consistency(M, C)
    roles = play(FLOW, "flow", Gaussian(M, C), student=net)
    net.gain = 1 + parameter
    loss, _ = run(discrete((64, 64), velocity="data"), roles)
    x, cos, sin = states()
    low = THETA - angle(FLOW, 1.0, THETA) / 64
    there = turned(x, cos * E - sin * X0, low - THETA)
    deviation = C / spread(cos, sin, C) * (x - cos * M)
    below = 1.4 * C / spread(low.cos()[:, None], low.sin()[:, None], C) * (there - low.cos()[:, None] * M)
    off = 1.4 * deviation - below
    slope = (off * deviation).mean(1) / off.square().mean(1).sqrt() / (THETA - low)
    assert gradient(loss, parameter)[0].item() == pytest.approx(slope.mean().item(), rel=1e-6)


def test_pseudo_huber_of_a_whole_sample():
    roles = world(FLOW, "flow", shift=0.0)
    loss, _ = run(made(intervals=(2, 2), huber=0.7), roles)
    sharp, _ = run(discrete((2, 2)), roles)
    assert 0 < loss.item() < 0.5 * sharp.item()


def test_inference_takes_any_steps_or_its_own_times():
    assert [hop.time for hop in SCM().inference(FLOW).hops] == [1.0, 0.5] and SCM().inference(FLOW).renoise
    assert len(SCM().inference(VP, 7).hops) == 7 and not SCM(renoise=False).inference(VP).renoise
    own = SCM(steps=2, times=(1.0, 0.8))
    assert [hop.time for hop in own.inference(FLOW).hops] == [1.0, 0.8] and len(own.inference(FLOW, 1).hops) == 1
    with pytest.raises(ValueError, match="cannot take 3"):
        own.inference(FLOW, 3)


def test_fields_are_checked_together():
    assert not list(SCM().check())
    assert len(list(SCM(velocity="data", trajectory=2, proposal=(0.0, 0.0), intervals=(8, 4), times=(0.5,)).check())) == 4
