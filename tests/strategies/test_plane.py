"""Every strategy end to end on a mixture in the plane: the student is far nearer to the teacher's many-step samples than the
teacher is in as many steps, and keeps every mode."""

import functools

import pytest
from plane import FLOW, MODES, Plane, apart, distil, euler, samples, shares, teacher

from stepdistill.roles import Denoiser, Roles
from stepdistill.strategies import BOOT, DMD, DMD2, LCM, RCM, SCM, TSCD, VSD, FDistill, PhasedDMD, Reflow

N = 8192
CASES = {  # strategy, iterations of 128 samples, learning rate
    "dmd": (DMD(guidance=1.0), 400, 2e-3),
    "dmd2, 1 step": (DMD2(steps=1, guidance=1.0, student_every=2), 400, 2e-3),
    "dmd2, 2 steps": (DMD2(steps=2, guidance=1.0, student_every=2, renoise=True), 500, 1e-3),
    # without prompts guidance adds nothing, whatever its times: what is left of it is the matching
    "dmd2, decoupled": (DMD2(steps=2, decoupled=True, guidance=2.0, student_every=2, renoise=True), 500, 1e-3),
    "phased_dmd": (PhasedDMD(steps=2, phases=2, phase_steps=400, guidance=1.0, student_every=2), 800, 1e-3),
    "f_distill, js": (FDistill(divergence="js", steps=1, guidance=1.0, student_every=2), 300, 2e-3),
    "f_distill, forward_kl": (FDistill(divergence="forward_kl", steps=1, guidance=1.0, student_every=2), 300, 2e-3),
    "lcm, 2 steps": (LCM(steps=2, guidance=(1.0, 1.0), grid=32, ema=0.95), 400, 1e-3),
    "scm": (SCM(guidance=1.0, warmup=100, proposal=(0.0, 1.6)), 400, 1e-3),
    "scm, exact, without pictures": (
        SCM(guidance=1.0, warmup=100, proposal=(0.0, 1.6), difference=None, trajectory=2, steps=1),
        300,
        1e-3,
    ),
    "scm, discrete, without a teacher": (
        SCM(velocity="data", proposal=(0.0, 1.6), intervals=(8, 32), double_every=150, adaptive=False),
        400,
        1e-3,
    ),
    "rcm": (RCM(steps=2, guidance=1.0, warmup=50, student_every=2), 400, 1e-3),
    "tscd": (TSCD((2, 1), 100, (1.0, 1.0), mix=(0.0, 0.1), grid=32, ema=0.95, steps=2), 250, 1e-3),
    "tscd, 2 segments": (TSCD((4, 2), 100, (1.0, 1.0), mix=(0.0, 0.0), grid=32, ema=0.95, steps=2), 250, 1e-3),
    "tscd, score": (TSCD((2, 1), 50, (1.0, 1.0), mix=(0.0, 0.0), grid=32, steps=1, score=True, student_every=2), 300, 2e-3),
    "boot": (BOOT(grid=8, guidance=1.0), 250, 2e-3),
    "reflow": (Reflow(), 100, 2e-3),
    "reflow, distilled": (Reflow(reflow_steps=50), 100, 2e-3),
    "vsd": (VSD(guidance=(1.0, 1.0)), 400, 2e-3),
}


@functools.cache
def of_teacher(steps):
    """What the teacher makes in so many steps, and how far that is spread."""
    net = teacher()
    made = samples(Roles(Plane(net), teacher=Denoiser(Plane(net), net)), euler(steps), N, seed=1)
    return made, apart(made)


def energy_distance(x, spread_of_x):
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| to the teacher's many-step samples Y."""
    goal, spread = of_teacher(100)
    return 2 * apart(x, goal) - spread_of_x - spread


@functools.cache
def teacher_s_distance(steps):
    return energy_distance(*of_teacher(steps))


def test_the_teacher_is_right_in_many_steps_and_wrong_in_few():
    assert abs(shares(of_teacher(100)[0]) - 1 / MODES).max() < 0.02
    assert teacher_s_distance(1) > 0.5 and teacher_s_distance(2) > 0.1


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2))])
def test_student_beats_the_teacher_in_as_many_steps(case, seed):
    strategy, iterations, rate = CASES[case]
    how = strategy.inference(FLOW)
    made = samples(distil(strategy, seed, iterations, rate), how, N, seed=2)
    assert energy_distance(made, apart(made)) <= 0.2 * teacher_s_distance(len(how.hops))
    assert shares(made).min() >= 0.5 / MODES
