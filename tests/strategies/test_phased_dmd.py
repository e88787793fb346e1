"""Phased distribution matching against closed forms, in worlds whose scores are known (reference: methods, 4)."""

import pytest
import torch
from matching import EVERY, A, B, C, M, T, U, world
from torch.autograd import grad as gradient
from worlds import F64, FLOW, PROCESSES, SHIFTED, SIGNS, VP, Affine, Gaussian, Script, play, spread

from stepdistill.batch import Batch, Draw
from stepdistill.diffusion import Prediction
from stepdistill.losses import denoising
from stepdistill.strategies import DMD2, PhasedDMD
from stepdistill.strategies.shared import fit_fake

TWO = {"steps": 2, "phases": 2, "phase_steps": 1, "guidance": 1.0, "student_every": 1}  # one step a phase


def at(schedule, time):
    """alpha and sigma of a time, as numbers."""
    return [c.item() for c in schedule.alpha_sigma(torch.tensor([time], dtype=F64))]


def above(schedule, s, low=0.02, high=0.98):
    """alpha and sigma [T, 1] of the times drawn above s."""
    least = schedule.unwarp(s)
    return [c[:, None] for c in schedule.alpha_sigma(schedule.warp(least + (1 - least) * (low + (high - low) * U)))]


def two_phases(schedule, kind, teacher):
    """Affine students of two steps, and the first phase's exact fake score; then s, and the slope and spread of x_s in z.

    x_s = kappa (B + A z) + sigma_s / sigma_1 z, because the first step's alpha is not 0 on DDPM tables.
    """
    s = PhasedDMD(**TWO).inference(schedule).hops[1].time
    (a_1, s_1), (a_s, s_s) = at(schedule, 1.0), at(schedule, s)
    kappa = a_s - s_s * a_1 / s_1
    std = kappa * A + s_s / s_1
    fake = Gaussian(kappa * B / a_s, ((std**2 - s_s**2) / a_s**2) ** 0.5)
    return play(schedule, kind, teacher, student_1=Affine(B, A, 4), student_2=Affine(B, A, 4), fake=fake), s, kappa, std


def test_fakes_minimizer_is_the_marginal_score():
    """Over fakes of N(mean, std^2) the loss from anchors x_s is stationary at the anchors' own distribution, in every space,
    clamped or not; with the anchors taken for clean samples, or their noise for all the noise, it is not."""
    z, eps = SIGNS
    for schedule, kind in PROCESSES:
        for s in (schedule.grid(4)[2], schedule.grid(4)[3]):
            a_s, s_s = at(schedule, s)
            x_s = (a_s * B + spread(a_s, s_s, A) * z).expand(T, -1)
            mean, std = (torch.tensor(x, dtype=F64, requires_grad=True) for x in (B, A))

            def loss(mean, std, space="eps", clamp=None, s=s, x_s=x_s, schedule=schedule, kind=kind):
                roles = world(schedule, kind, Gaussian(M, C), fake=Gaussian(mean, std))
                return fit_fake(roles, x_s, {}, Script(uniform=U, normal=eps), space, s, clamp)

            for space in ("eps", "x0", "v", "flow"):
                for clamp in (None, 10.0):
                    best = loss(mean, std, space, clamp)
                    assert all(abs(g.item()) < 1e-9 * best.item() for g in gradient(best, (mean, std)))
            assert all(loss(*x) > loss(B, A) for x in ((B + 0.1, A), (B - 0.1, A), (B, A + 0.1), (B, A - 0.1)))

            roles = world(schedule, kind, Gaussian(M, C), fake=Gaussian(mean, std))
            t, since = schedule.time(torch.atan2(*above(schedule, s, 0.002, 0.998)[::-1]).flatten()), torch.full((T,), s)
            p = roles.fake(roles.noise(x_s, t, eps.expand(T, -1), since.double()), t, {})
            for x0 in (x_s, x_s / a_s):
                naive = denoising(p, Prediction(x0, eps.expand(T, -1), p.alpha, p.sigma), "flow")
                assert max(abs(g.item()) for g in gradient(naive, (mean, std), retain_graph=True)) > 1e-2


@EVERY
def test_clamp_is_the_weight_of_equation_13(schedule, kind):
    """min(1, c sigma_{t|s}^2), which is clamp(1 / sigma^2, 0, c) times the error times sigma squared."""
    s, z = schedule.grid(2)[1], SIGNS[0].expand(T, -1)
    roles, (a_s, s_s), (a, sigma) = world(schedule, kind, Gaussian(M, C)), at(schedule, s), above(schedule, s, 0.002, 0.998)
    variance = sigma**2 - (a / a_s) ** 2 * s_s**2
    each = [
        fit_fake(roles, z[:1], {}, Script(uniform=U[k : k + 1], normal=SIGNS[1]), "flow", s).item() * min(1, 10 * v.item())
        for k, v in enumerate(variance.flatten())
    ]
    got = fit_fake(roles, z, {}, Script(uniform=U, normal=SIGNS[1]), "flow", s, 10.0).item()
    assert got == pytest.approx(sum(each) / T, rel=1e-9) and (10 * variance < 1).any() and (10 * variance > 1).any()


@EVERY
@pytest.mark.parametrize("weight", ["kl", "dmd"])
def test_gradient_of_a_phase_is_the_closed_form(schedule, kind, weight):
    """alpha_{t|s} E[(s_q - s_p) dx_s] with x_s = kappa (b + a z) + ...; in DMD's form sigma^2 / alpha_t of it over the
    normalizer, in which the prediction stands for the clean sample."""
    z, eps = SIGNS
    roles, s, kappa, std = two_phases(schedule, kind, teacher := Gaussian(M, C))
    (a_s, _), (a, sigma) = at(schedule, s), above(schedule, s)
    draw = Script(uniform=U, normal=eps)
    who, loss, _ = next(PhasedDMD(**TWO, weight=weight).losses(roles, Batch(noise=z.expand(T, -1), cond={}), draw))
    assert who == "student"
    v_p, v_q = spread(a, sigma, C) ** 2, spread(a, sigma, roles.fake.net.std) ** 2
    step = (v_q - (a / a_s) ** 2 * std**2).sqrt()  # sigma of q(x_t | x_s)
    x_s = kappa * B + std * z
    away = kappa * B / a_s - M
    in_b, in_a = kappa * (a / a_s) * a * away / v_p, kappa * (a / a_s) ** 2 * std * (1 / v_p - 1 / v_q)
    if weight == "dmd":
        real = teacher(a / a_s * x_s + step * eps, a, sigma, {})[0]
        norm = (B + A * z - real).abs().mean(1, keepdim=True)
        in_b, in_a = (x * sigma**2 / a * a_s / a / norm for x in (in_b, in_a))
    got = gradient(loss, roles.student_1.parameters())
    assert [g.sum().item() for g in got] == pytest.approx([in_b.mean().item(), in_a.mean().item()], rel=1e-8)
    assert gradient(loss, roles.student_2.parameters(), allow_unused=True) == (None, None)


@EVERY
def test_a_phase_rests_where_its_samples_are_the_teacher_s_marginal(schedule, kind):
    roles, s, kappa, _ = two_phases(schedule, kind, Gaussian(M, C))
    (_, s_1), (a_s, s_s) = at(schedule, 1.0), at(schedule, s)
    right = Affine(a_s * M / kappa, (spread(a_s, s_s, C) - s_s / s_1) / kappa, 4)
    roles = play(schedule, kind, Gaussian(M, C), student_1=right, fake=Gaussian(M, C))
    for weight in ("kl", "dmd"):
        draw = Script(uniform=U, normal=SIGNS[1])
        batch = Batch(noise=SIGNS[0].expand(T, -1), cond={})
        _, loss, _ = next(PhasedDMD(**TWO, weight=weight).losses(roles, batch, draw))
        assert all(g.abs().max() < 1e-9 for g in gradient(loss, roles.student_1.parameters()))


@EVERY
def test_one_phase_is_dmd2(schedule, kind):
    both = []
    alike = DMD2(steps=1, renoise=False), PhasedDMD(phases=1, weight="dmd")
    for strategy, name in zip(alike, ("student", "student_1"), strict=True):
        strategy.steps, strategy.guidance = 1, 1.0
        roles = play(schedule, kind, Gaussian(M, C), **{name: Affine(B, A, 4)}, fake=Gaussian(B, A))
        batch, draw = Batch(noise=SIGNS[0].expand(T, -1), cond={}), Script(uniform=U, normal=SIGNS[1])
        (_, loss, _), (_, critic, _) = strategy.losses(roles, batch, draw)
        both.append([loss.item(), *(g.sum().item() for g in gradient(loss, roles[name].parameters())), critic.item()])
    if kind == "eps":  # then the critics' errors are measured in the same space
        assert both[0] == pytest.approx(both[1], rel=1e-12)
    assert both[0][:3] == pytest.approx(both[1][:3], rel=1e-12)


@pytest.mark.parametrize("schedule", [VP, FLOW, SHIFTED])
def test_times_lie_above_the_phase_s_end(schedule):
    """Uniform before the schedule's shift, as the teacher's own are."""
    strategy, asked = PhasedDMD(**TWO), []
    s = strategy.inference(schedule).hops[1].time
    kind = "eps" if schedule is VP else "flow"
    roles = play(schedule, kind, Gaussian(M, C), student_1=Affine(B, A, 4), fake=Gaussian(M, C))
    roles.fake.net.register_forward_hook(lambda _n, args, _o: asked.append(schedule.time(torch.atan2(args[2], args[1]))))
    n = 2000
    list(strategy.losses(roles, Batch(noise=torch.zeros(n, 4, dtype=F64), cond={}), Draw(0, 0, range(n))))
    for times, margin in zip(asked, (0.02, 0.002), strict=True):
        least = schedule.unwarp(s)
        share = (torch.tensor([schedule.unwarp(t) for t in times.flatten().tolist()]) - least) / (1 - least)
        assert margin - 1e-6 <= share.min() and share.max() <= 1 - margin + 1e-6
        assert torch.histc(share, 10, 0, 1).min() > 120


@pytest.mark.parametrize("renoise", [False, True])
@pytest.mark.parametrize("phase", [0, 1])
@pytest.mark.parametrize("exit_hop", [0, 1])
def test_a_phase_is_simulated_from_the_ones_before(phase, exit_hop, renoise):
    """Earlier students walk their steps without gradient; any step of the phase goes straight to its end."""
    strategy, asked = PhasedDMD(phase_steps=1, guidance=1.0, student_every=1, renoise=renoise), []
    roles = play(FLOW, "flow", Gaussian(M, C), student_1=Affine(B, A, 4), student_2=Affine(-B, A, 4), fake=Gaussian(M, C))
    for name in ("student_1", "student_2"):
        hook = lambda _n, x, out, who=name: asked.append((who, x[2].flatten()[0].item(), out[0].requires_grad))  # noqa: E731
        roles[name].net.register_forward_hook(hook)
    zeros = torch.zeros(T, 4, dtype=F64)
    normal = zeros[0] + 1.0 if renoise else zeros[0]
    list(strategy.losses(roles, Batch(noise=zeros, cond={}), Script(step=phase, uniform=U, normal=normal, choice=exit_hop)))
    walk = [("student_1", 1.0), ("student_1", 0.75), ("student_2", 0.5), ("student_2", 0.25)][: 2 * phase + exit_hop + 1]
    assert asked == [(*hop, k == len(walk) - 1) for k, hop in enumerate(walk)]


@EVERY
def test_only_the_teacher_is_guided(schedule, kind):
    """Guidance 4 between N(1, c^2) and N(-0.5, c^2) is a teacher of mean 5.5; the fake sees no null prompt."""
    losses, asked = [], []
    for teacher, guidance in ((Gaussian(None, C), 4.0), (Gaussian(-0.5 + 4 * 1.5, C), 1.0)):
        roles, *_ = two_phases(schedule, kind, teacher)
        roles.fake.net.register_forward_hook(lambda _net, args, _out: asked.append(len(args[0])))
        cond, null = ({"mean": torch.full((T, 1), m, dtype=F64)} for m in (1.0, -0.5))
        batch, draw = Batch(SIGNS[0].expand(T, -1), cond, null), Script(uniform=U, normal=SIGNS[1])
        _, loss, _ = next(PhasedDMD(**TWO | {"guidance": guidance}).losses(roles, batch, draw))
        losses.append([loss.item(), *(g.sum().item() for g in gradient(loss, roles.student_1.parameters()))])
    assert losses[0] == pytest.approx(losses[1], rel=1e-9) and asked == [T, T]


def test_the_critic_teaches_nobody_else_and_begins_each_phase_as_the_teacher():
    roles, *_ = two_phases(FLOW, "flow", Gaussian(M, C))
    roles = play(FLOW, "flow", roles.teacher.net, **{name: roles[name].net for name in ("student_1",)}, fake=Affine(B, A, 4))
    strategy, batch = PhasedDMD(**TWO), Batch(noise=SIGNS[0].expand(T, -1), cond={})
    _, (who, loss, _) = strategy.losses(roles, batch, Draw(0, 0, range(T)))
    assert who == "critic" and gradient(loss, roles.student_1.parameters(), allow_unused=True) == (None, None)
    teacher = Affine(1.0, 2.0, 4)
    roles = play(FLOW, "flow", teacher, fake=Affine(B, A, 4))
    strategy.enter(roles, 1)
    assert all(torch.equal(p, q) for p, q in zip(roles.fake.parameters(), teacher.parameters(), strict=True))


def test_the_critic_s_space_and_clamp_are_the_recipe_s():
    critic = []
    for own in ({}, {"clamp": 1e-6}, {"fake_loss": "x0"}):
        roles, *_ = two_phases(FLOW, "flow", Gaussian(M, C))
        draw = Script(uniform=U, normal=SIGNS[1])
        _, (_, loss, _) = PhasedDMD(**TWO, **own).losses(roles, Batch(noise=SIGNS[0].expand(T, -1), cond={}), draw)
        critic.append(loss.item())
    assert critic[1] < 1e-4 * critic[0] and critic[2] != pytest.approx(critic[0], rel=0.05)


def test_stages():
    strategy = PhasedDMD(steps=6, phases=3, phase_steps=10)
    assert strategy.roles == ("student_1", "student_2", "student_3", "fake") and strategy.stages == 3
    assert [strategy.stage(step) for step in (0, 9, 10, 19, 20, 99)] == [0, 0, 1, 1, 2, 2]
    assert strategy.players(1) == {"student": ("student_2",), "critic": ("fake",)}


def test_inference():
    hops = PhasedDMD().inference(VP).hops
    assert [(round(hop.time * 999), hop.role[-1]) for hop in hops] == [(999, "1"), (749, "1"), (499, "2"), (249, "2")]
    assert not PhasedDMD().inference(VP).renoise and not PhasedDMD().inference(FLOW).renoise
    assert [(round(hop.time * 999), hop.role[-1]) for hop in PhasedDMD().inference(VP, 2).hops] == [(999, "1"), (499, "2")]
    with pytest.raises(ValueError, match="use a multiple of 2"):
        PhasedDMD().inference(VP, 1)
    with pytest.raises(ValueError, match="use a divisor of 4"):
        PhasedDMD().inference(VP, 3)


def test_fields_are_checked_together():
    assert not list(PhasedDMD().check())
    assert len(list(PhasedDMD(steps=5, t_range=(0.9, 0.1), times=(1.0,)).check())) == 3
