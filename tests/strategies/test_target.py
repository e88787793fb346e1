"""The target network of those that learn from themselves: a running average of the student."""

import pytest
import torch
from worlds import FLOW, Affine, Gaussian, play

from stepdistill.strategies import BOOT, LCM, TSCD


def world(**target):
    return play(FLOW, "flow", Gaussian(0.7, 0.5), student=Affine(1.0, 2.0, 3), **target)


@pytest.mark.parametrize("kind", [BOOT, LCM, TSCD])
def test_average_follows_the_student_only_when_it_moved(kind):
    roles, strategy = world(target=Affine(0.0, 0.0, 3)), kind(ema=0.9)
    strategy.after_step(roles, {"critic"})
    assert roles.target.net.b.tolist() == [0.0] * 3
    strategy.after_step(roles, {"student"})
    assert torch.stack(roles.target.parameters()).flatten().tolist() == pytest.approx([0.1] * 3 + [0.2] * 3)
    strategy.enter(roles, 0)
    assert all(map(torch.equal, roles.target.parameters(), roles.student.parameters()))


@pytest.mark.parametrize("kind", [BOOT, LCM, TSCD])
def test_without_an_average_the_student_is_its_own_target(kind):
    roles, strategy = world(), kind()
    assert strategy.roles == ("student",) and kind(ema=0.9).roles == ("student", "target")
    strategy.enter(roles, 0)
    strategy.after_step(roles, {"student"})
    assert roles.student.net.b.tolist() == [1.0] * 3
