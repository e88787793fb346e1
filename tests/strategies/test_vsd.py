"""Variational score distillation against closed forms, in worlds whose scores are known (reference: methods, 9)."""

import pytest
import torch
from matching import EVERY, A, B, C, M, T, U, first, levels, moved, world
from torch.autograd import grad as gradient
from worlds import F64, FLOW, SIGNS, VP, Affine, Gaussian, Script, spread

from stepdistill.batch import Batch, Draw
from stepdistill.strategies.vsd import VSD


def closed(a, s, mean, b=B, spread_of_q=A):
    """sigma^2 E[(e_p - e_q) dG] at each time: sigma^3 alpha (b - m) / V_p in b, sigma^3 alpha A (1 / V_p - 1 / V_q) in a."""
    v_p, v_q = spread(a, s, C) ** 2, spread(a, s, spread_of_q) ** 2
    return s**3 * a * (b - mean) / v_p, s**3 * a * spread_of_q * (1 / v_p - 1 / v_q)


@EVERY
def test_gradient_is_the_closed_form(schedule, kind):
    roles = world(schedule, kind, Gaussian(M, C))
    loss, _ = first(VSD(guidance=(1.0, 1.0)), roles, *SIGNS)
    want = [x.mean().item() for x in closed(*levels(schedule), M)]
    assert moved(loss, roles) == pytest.approx(want, rel=1e-9)


@EVERY
def test_both_scores_are_guided(schedule, kind):
    """With q = N(b, a^2) whatever the prompt, guidance w takes the teacher's mean to m_u + w (m_c - m_u) and leaves the
    fake's. The scale may be drawn for each sample: the gradient is linear in it, so PG-SB's is that of the mean scale."""
    seen, (m_c, m_u) = [], (1.0, -0.5)
    cond, null = ({"mean": torch.full((T, 1), m, dtype=F64)} for m in (m_c, m_u))
    fake = Gaussian(B, A)
    fake.register_forward_hook(lambda _net, args, _out: seen.append(len(args[0])))
    roles = world(schedule, kind, Gaussian(None, C), fake=fake)
    loss, _ = first(VSD(guidance=(2.0, 6.0)), roles, *SIGNS, cond=cond, null=null)
    assert seen == [2 * T]
    a, s = levels(schedule)
    w = (2.0 + 4.0 * U)[:, None]
    want = [x.mean().item() for x in closed(a, s, m_u + w * (m_c - m_u))]
    assert moved(loss, roles) == pytest.approx(want, rel=1e-9)


@EVERY
def test_fixed_point_is_the_unguided_teacher(schedule, kind):
    """Where the fake is exact with and without the prompt, guidance of both cancels, and the student may rest on p itself."""
    cond, null = ({"mean": torch.full((T, 1), m, dtype=F64)} for m in (M, -0.5))
    roles = world(schedule, kind, Gaussian(None, C), fake=Gaussian(None, C), b=M, a=C)
    loss, _ = first(VSD(), roles, *SIGNS, cond=cond, null=null)
    assert all(abs(x) < 1e-9 for x in moved(loss, roles))


@EVERY
@pytest.mark.parametrize("off", [0.0, 0.1])
def test_fake_s_loss_is_alpha_times_the_error_in_eps(schedule, kind, off):
    """alpha^2 E|e - eps|^2 is alpha^4 a^2 / V for the exact fake of N(b, a^2), and stationary there."""
    mean, std = torch.tensor(B + off, dtype=F64, requires_grad=True), torch.tensor(A, dtype=F64, requires_grad=True)
    roles = world(schedule, kind, Gaussian(M, C), fake=Gaussian(mean, std))
    z, eps = SIGNS
    draw = Script(uniform=[U, U, U, torch.ones(T)], normal=eps)  # times, scales, times; nobody's prompt is dropped
    batch = Batch(noise=z.expand(T, -1), cond={}, null={})
    *_, (who, loss, _) = VSD(guidance=(1.0, 1.0)).losses(roles, batch, draw)
    assert who == "critic"
    a, s = levels(schedule, 0.002, 0.998)
    v = spread(a, s, A) ** 2
    exact = (a**4 * A**2 / v).mean().item()  # and a wrong mean adds alpha^4 sigma^2 off^2 / V^2
    assert loss.item() == pytest.approx(exact + (a**4 * s**2 * off**2 / v**2).mean().item(), rel=1e-9)
    slopes = gradient(loss, (mean, std))
    if off:
        assert slopes[0].item() > 1e-3 * exact
    else:
        assert all(abs(slope.item()) < 1e-9 * exact for slope in slopes)


def test_prompts_are_dropped_for_the_fake_alone():
    """Of the share that draws below it; the fake's own guidance needs the empty prompt."""
    seen = []
    cond, null = ({"mean": torch.full((T, 1), m, dtype=F64)} for m in (1.0, -0.5))
    fake = Gaussian(None, C)
    fake.register_forward_hook(lambda _net, args, _out: seen.append(args[3]["mean"]))
    roles = world(FLOW, "flow", Gaussian(None, C), fake=fake)
    draw = Script(uniform=[U, U, U, torch.tensor([0.05, 0.3, 0.09, 0.1, 0.9])], normal=SIGNS[1])
    list(VSD().losses(roles, Batch(noise=SIGNS[0].expand(T, -1), cond=cond, null=null), draw))
    assert seen[-1].flatten().tolist() == [-0.5, 1.0, -0.5, 1.0, 1.0]
    list(VSD(guidance=(1.0, 1.0)).losses(roles, Batch(noise=SIGNS[0].expand(T, -1), cond=cond), Draw(0, 0, range(T))))
    assert seen[-1].flatten().tolist() == [1.0] * T  # a teacher without an empty prompt


def test_both_players_learn_from_the_same_samples():
    roles = world(VP, "eps", Gaussian(M, C), fake=Affine(B, A, 4))
    asked = []
    roles.student.net.register_forward_hook(lambda _net, _args, out: asked.append(out[0]))
    x = torch.randn(6, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    for who, loss, _ in VSD(guidance=(1.0, 1.0)).losses(roles, Batch(noise=x, cond={}), Draw(0, 0, range(6))):
        mine, other = (roles.student, roles.fake) if who == "student" else (roles.fake, roles.student)
        got = gradient(loss, mine.parameters() + other.parameters(), allow_unused=True)
        assert None not in got[:2] and got[2:] == (None, None)
    assert len(asked) == 1


def test_inference():
    assert [hop.time for hop in VSD().inference(VP).hops] == [1.0] and VSD().inference(VP, 1) == VSD().inference(VP)
    with pytest.raises(ValueError, match="set steps to 1"):
        VSD().inference(VP, 4)


def test_fields_are_checked_together():
    assert not list(VSD().check()) and len(list(VSD(guidance=(5.0, 2.0), t_range=(0.9, 0.1)).check())) == 2
