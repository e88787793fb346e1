"""DMD2 with guidance at times of its own, against closed forms (reference: methods, 3)."""

import pytest
import torch
from matching import A, B, C, T, U, first, moved, world
from worlds import F64, FLOW, SIGNS, Gaussian, Script, spread

from stepdistill.batch import Batch
from stepdistill.strategies import DMD2


def guided_world(b, a=A, fake=None):
    """A teacher of N(1, C^2) with the prompt and N(-0.5, C^2) without; and the two as arguments of `first`."""
    cond, null = ({"mean": torch.full((T, 1), m, dtype=F64)} for m in (1.0, -0.5))
    return world(FLOW, "flow", Gaussian(None, C), b=b, a=a, fake=fake), {"cond": cond, "null": null}


def test_with_coupled_times_it_is_dmd2():
    losses = []
    for own in ({}, {"decoupled": True, "augment_range": (0.02, 0.98)}):
        roles, prompts = guided_world(B)
        loss, _ = first(DMD2(steps=1, guidance=4.0, **own), roles, *SIGNS, **prompts)
        losses.append([loss.item(), *moved(loss, roles)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)


def test_weight_of_what_guidance_adds():
    """It multiplies guidance - 1: twice the weight at 4 is 7."""
    losses = []
    for own in ({"guidance": 4.0, "augment": 2.0}, {"guidance": 7.0}):
        roles, prompts = guided_world(B)
        loss, _ = first(DMD2(steps=1, decoupled=True, **own), roles, *SIGNS, **prompts)
        losses.append([loss.item(), *moved(loss, roles)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)


@pytest.mark.parametrize("at", [0.3, 0.8])
def test_gradient_and_fixed_point(at):
    """The pull to the data at one time, the push of guidance at another: it is where they balance that the student rests,
    m_c + (w - 1)(m_c - m_u) omega(augmentation) / omega(matching), omega = sigma^2 / V, with the data's own spread."""
    w, strategy = 4.0, DMD2(steps=1, guidance=4.0, decoupled=True, t_range=(0.0, 1.0))
    matching, augmenting = torch.full((T,), 0.6, dtype=F64), torch.full((T,), at, dtype=F64)

    def omega(u):
        a, s = (c[0].item() for c in FLOW.alpha_sigma(u))
        return s**2 / spread(a, s, C) ** 2

    rest = 1.0 + (w - 1) * 1.5 * omega(augmenting) / omega(matching)
    roles, prompts = guided_world(rest, C)
    loss, _ = first(strategy, roles, *SIGNS, u=[matching, augmenting], **prompts)
    assert all(abs(x) < 1e-9 for x in moved(loss, roles))
    z, eps = SIGNS
    roles, prompts = guided_world(B)
    loss, _ = first(strategy, roles, z, eps, u=[matching, augmenting], **prompts)
    a, s = (c[:, None] for c in FLOW.alpha_sigma(matching))
    push = (w - 1) * 1.5 * omega(augmenting)
    x0 = B + A * z
    scale = 1 / (x0 - Gaussian(1.0, C)(a * x0 + s * eps, a, s, {})[0] - push).abs().mean(1, keepdim=True)
    want = (scale * (omega(matching) * (B - 1.0) - push)).mean().item()
    assert moved(loss, roles)[0] == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("exit_hop", [0, 1])
def test_guidance_is_less_noisy_than_the_student(exit_hop):
    """Its times are those of the matching's law, scaled to lie below the student's own; or of a law that is given."""
    for own, high in ((None, (1.0, 0.5)[exit_hop]), ((0.1, 0.3), None)):
        strategy, (roles, prompts), seen = DMD2(steps=2, decoupled=True, augment_range=own), guided_world(B), []
        roles.teacher.net.register_forward_hook(lambda _n, args, _o, s=seen: s.append(FLOW.time(torch.atan2(args[2], args[1]))))
        draw = Script(uniform=[U, U], normal=torch.zeros(4, dtype=F64), choice=exit_hop)
        next(strategy.losses(roles, Batch(noise=torch.zeros(T, 4, dtype=F64), **prompts), draw))
        assert torch.allclose(seen[0].flatten(), 0.02 + 0.96 * U)
        times = 0.1 + 0.2 * U if own else high * (0.02 + 0.96 * U)
        assert torch.allclose(seen[1].flatten(), times.repeat(2))  # with prompts, and without


def test_fields_are_checked_together():
    assert not list(DMD2(decoupled=True, augment_range=(0.1, 0.2), augment=2.0).check())
    assert len(list(DMD2(augment_range=(0.5, 0.2), augment=2.0).check())) == 3
    assert len(list(DMD2(decoupled=True, guidance=1.0).check())) == 1
