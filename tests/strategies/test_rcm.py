"""rCM against closed forms in Gaussian worlds (reference: methods, parts 7 and 8); its consistency is that of test_trigflow."""

import pytest
import torch
from torch.autograd import grad as gradient
from worlds import F64, FLOW, PROCESSES, VP, Affine, Consistency, Gaussian, Script, play, spread

from stepdistill.batch import Batch, Draw
from stepdistill.strategies.rcm import RCM

M, C, N = 0.7, 0.5, 5  # the data's mean and spread; samples
EVERY = pytest.mark.parametrize(("schedule", "kind"), PROCESSES)
Z, E = torch.randn(2, N, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
U = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=F64)
END = M + C * Z


def made(**kw):
    return RCM(**{"guidance": 1.0, "warmup": 0, "difference": None, "proposal": (0.0, 1.0), **kw})


def world(schedule, kind, fake=None, **wrong):
    return play(schedule, kind, Gaussian(M, C), student=Consistency(M, C, **wrong), fake=fake or Gaussian(M, C))


def run(strategy, roles, step=0, draw=None, **batch):
    """(player, loss, logs) of one iteration."""
    given = Batch(**{"noise": E, "x0": END, "cond": {}, **batch})
    return list(strategy.losses(roles, given, draw or Draw(0, step, range(N))))


@EVERY
def test_both_terms_vanish_at_the_exact_student(schedule, kind):
    """Its samples are the teacher's data, so that the exact fake score is the teacher's; and it has no tangent."""
    shift = torch.zeros((), dtype=F64, requires_grad=True)
    roles = world(schedule, kind, shift=shift)
    (_, first, logs), (_, second, _) = run(made(), roles)
    assert logs["tangent"].item() < 1e-11
    assert all(abs(gradient(loss, shift)[0].item()) < 1e-9 for loss in (first, second))


@EVERY
def test_the_second_term_is_distribution_matching_of_what_the_student_makes(schedule, kind):
    """One step of a shifted student, and its exact fake score: the mean of (D_fake - D_teacher) / mean|x0 - D_teacher|."""
    shift = torch.tensor(0.4, dtype=F64, requires_grad=True)
    roles = world(schedule, kind, Gaussian(M + 0.4, C), shift=shift)
    draw = Script(uniform=[U, U], normal=[E, Z], choice=0)
    _, (who, loss, logs) = run(made(matching=2.0), roles, draw=draw)
    assert who == "student" and loss.item() == pytest.approx(2 * logs["matching"].item())
    t = schedule.warp(0.02 + 0.96 * U)
    a, s = (c[:, None] for c in schedule.alpha_sigma(t))
    top = [c.item() for c in schedule.alpha_sigma(torch.ones(1, dtype=F64))]
    x0 = M + C / spread(*top, C) * (E - top[0] * M) + 0.4
    x_t = a * x0 + s * Z
    real, fake = (Gaussian(m, C)(x_t, a, s, {})[0] for m in (M, M + 0.4))
    g = (fake - real) / (x0 - real).abs().mean(1, keepdim=True)
    assert gradient(loss, shift)[0].item() == pytest.approx(2 * g.mean().item(), rel=1e-9)


def test_who_moves_when():
    """Consistency alone while it warms up; then the student once in so many iterations, and the critic in the others."""
    turns = []
    for step in range(8):
        strategy, roles = made(warmup=2, student_every=3), world(FLOW, "flow")
        turns.append([(who, *sorted(logs)) for who, _, logs in run(strategy, roles, step)])
    both = [("student", "consistency", "tangent"), ("student", "matching")]
    critic = [("critic", "denoising")]
    assert turns == [both[:1], both[:1], critic, both, critic, critic, both, critic]


def test_gradients_stay_with_their_players():
    roles = world(VP, "eps")
    roles.student.net.shift = torch.zeros((), dtype=F64, requires_grad=True)
    roles.fake.net.mean = torch.tensor(M, dtype=F64, requires_grad=True)
    ours, others = roles.student.net.shift, roles.fake.net.mean
    for _, loss, _ in run(made(student_every=2), roles, 0):
        assert gradient(loss, (ours, others), allow_unused=True)[1] is None
    ((_, loss, _),) = run(made(student_every=2), roles, 1)
    assert gradient(loss, (ours, others), allow_unused=True)[0] is None


@EVERY
def test_the_critic_learns_trigflows_velocity(schedule, kind):
    """|D_fake - x|^2 / sin^2(theta), on the student's samples."""
    roles = world(schedule, kind, Gaussian(0.2, 0.8))
    draw = Script(step=1, uniform=[U], normal=[E, Z], choice=0)
    ((who, loss, _),) = run(made(student_every=2), roles, draw=draw)
    assert who == "critic"
    top = [c.item() for c in schedule.alpha_sigma(torch.ones(1, dtype=F64))]
    x = M + C / spread(*top, C) * (E - top[0] * M)
    a, s = (c[:, None] for c in schedule.alpha_sigma(schedule.warp(0.002 + 0.996 * U)))
    d = Gaussian(0.2, 0.8)(a * x + s * Z, a, s, {})[0]
    sin = s / (a**2 + s**2).sqrt()
    assert loss.item() == pytest.approx(((d - x) / sin).square().mean().item(), rel=1e-8)


@EVERY
def test_rollouts_fall_and_renoise(schedule, kind):
    """From noise at time 1 each next state is the last clean prediction with new noise, at a time no higher."""
    asked = []
    roles = world(schedule, kind)
    roles.student.net.register_forward_hook(lambda _n, args, out: asked.append((*args[:3], out[0], torch.is_grad_enabled())))
    high = torch.flip(U, [0])
    draw = Script(step=1, uniform=[high, U, high], normal=[E, Z, E + Z, Z - E], choice=3)
    made(student_every=2).generate(roles, Batch(noise=E, cond={}), draw, grad=True)
    assert [grad for *_, grad in asked] == [False, False, False, True] and torch.equal(asked[0][0], E)
    angles = torch.stack([torch.atan2(s, a).flatten() for _, a, s, _, _ in asked])
    assert (angles[1:] <= angles[:-1] + 1e-12).all() and (angles[1] < angles[0]).all()
    t = schedule.warp(0.02 + 0.96 * torch.minimum(high, U))
    for k, (noise, u) in enumerate([(Z, high), (E + Z, torch.minimum(high, U)), (Z - E, torch.minimum(high, U))], 1):
        a, s = (c[:, None] for c in schedule.alpha_sigma(schedule.warp(0.02 + 0.96 * u)))
        assert torch.allclose(asked[k][0], a * asked[k - 1][3] + s * noise, rtol=0, atol=1e-9)
    assert torch.allclose(schedule.time(angles[-1]), t, rtol=0, atol=1e-9)


def test_samples_are_of_noise_of_their_own():
    """Not of that which the pictures were mixed with, or the two terms would be correlated."""
    roles = world(FLOW, "flow", fake=Affine(0.0, 1.0, 4))
    asked = []
    roles.student.net.register_forward_hook(lambda _n, args, _o: asked.append(args[0]))
    run(made(student_every=2), roles, 1)
    assert not torch.equal(asked[0], E)


def test_pictures_are_needed_only_off_the_teachers_trajectories():
    assert made().needs == {"x0"} and made(trajectory=2).needs == frozenset()
    (_, loss, logs), _ = run(made(trajectory=2), world(FLOW, "flow"), x0=None)
    assert loss.item() < 1e-18 and logs["tangent"].item() < 1e-10


def test_inference_takes_any_steps_or_its_own_times():
    assert [hop.time for hop in RCM(steps=2).inference(FLOW).hops] == [1.0, 0.5] and RCM().inference(FLOW).renoise
    own = RCM(steps=4, times=(0.9878, 0.9338, 0.8529, 0.6090))
    assert len(own.inference(FLOW, 2).hops) == 2
    with pytest.raises(ValueError, match="cannot take 3"):
        own.inference(FLOW, 3)


def test_fields_are_checked_together():
    assert not list(RCM().check())
    assert len(list(RCM(student_every=1, t_range=(0.9, 0.1), proposal=(0.0, 0.0), times=(0.5,)).check())) == 4
