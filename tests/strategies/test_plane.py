"""Every strategy end to end on a mixture in the plane: the student is far nearer to the teacher's many-step samples than the
teacher is in as many steps, and keeps every mode."""

import functools

import pytest
from plane import FLOW, MODES, Plane, distil, energy_distance, euler, samples, shares, teacher

from stepdistill.roles import Denoiser, Roles
from stepdistill.strategies import DMD2, LCM, VSD, FDistill

N, RATE = 8192, 2e-3
CASES = {  # strategy, and iterations of 128 samples
    "dmd2, 1 step": (DMD2(steps=1, guidance=1.0, student_every=2), 400),
    "dmd2, 2 steps": (DMD2(steps=2, guidance=1.0, student_every=2), 400),
    "f_distill, js": (FDistill(divergence="js", steps=1, guidance=1.0, student_every=2), 300),
    "f_distill, forward_kl": (FDistill(divergence="forward_kl", steps=1, guidance=1.0, student_every=2), 300),
    "lcm, 2 steps": (LCM(steps=2, guidance=(1.0, 1.0), grid=32, ema=0.95), 400),
    "vsd": (VSD(guidance=(1.0, 1.0)), 400),
}


@functools.cache
def of_teacher(steps):
    net = teacher()
    return samples(Roles(Plane(net), teacher=Denoiser(Plane(net), net)), euler(steps), N, seed=1)


def test_the_teacher_is_right_in_many_steps_and_wrong_in_few():
    assert abs(shares(of_teacher(100)) - 1 / MODES).max() < 0.02
    assert energy_distance(of_teacher(1), of_teacher(100)) > 0.5
    assert energy_distance(of_teacher(2), of_teacher(100)) > 0.1


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_student_beats_the_teacher_in_as_many_steps(case, seed):
    strategy, iterations = CASES[case]
    how = strategy.inference(FLOW)
    made = samples(distil(strategy, seed, iterations, RATE), how, N, seed=2)
    goal = of_teacher(100)
    assert energy_distance(made, goal) <= 0.2 * energy_distance(of_teacher(len(how.hops)), goal)
    assert shares(made).min() >= 0.5 / MODES
