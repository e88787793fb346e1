"""TSCD's stages, the numbers of steps that its students take, and the rules of its fields."""

import pytest
import torch
from worlds import F64, FLOW, SHIFTED, VP, Affine, Gaussian, play

from stepdistill.batch import Batch, Draw
from stepdistill.sampling import trailing
from stepdistill.strategies import DMD2, TSCD

C = 0.5  # the data's spread


def test_the_last_stage_is_dmd2_of_one_step():
    strategy = TSCD(segments=(2, 1), mix=(0.0, 0.1), stage_steps=5, steps=1, guidance=(2.0, 4.0), score=True, student_every=3)
    cond, null = ({"mean": torch.full((4, 1), m, dtype=F64)} for m in (1.0, -0.5))
    roles = play(VP, "eps", Gaussian(None, C), student=Affine(-0.2, 0.9, 4), fake=Gaussian(-0.2, 0.9))
    told = {"noise": torch.randn(4, 4, dtype=F64, generator=torch.Generator().manual_seed(0)), "cond": cond, "null": null}
    for step in (12, 13):  # the student's turn, and not
        got, want = (
            [(who, loss.item(), logs.keys()) for who, loss, logs in one.losses(roles, Batch(**told), Draw(0, step, range(4)))]
            for one in (strategy, DMD2(steps=1, guidance=3.0, student_every=3))
        )
        assert got == want and len(got) == 2 - step % 3


def test_stages():
    strategy = TSCD(segments=(4, 2, 1), mix=(0.0, 0.1, 0.2), stage_steps=10, ema=0.9)
    assert strategy.roles == ("student", "target") and strategy.stages == 3 and not list(TSCD().check())
    assert [strategy.stage(step) for step in (0, 9, 10, 19, 20, 99)] == [0, 0, 1, 1, 2, 2]
    assert [strategy.players(stage).get("critic") for stage in range(3)] == [None, ("head",), ("head",)]
    strategy.score, strategy.ema = True, None
    assert strategy.roles == ("student", "fake") and strategy.stages == 4
    assert [strategy.stage(step) for step in (29, 30, 99)] == [2, 3, 3]
    assert strategy.players(3) == {"student": ("student",), "critic": ("fake",)}
    plain = TSCD(segments=(1,), mix=(0.0,))
    assert not plain.modules() and plain.roles == ("student",)
    strategy.setup(play(VP, "eps", Gaussian(0.7, C)))
    assert list(strategy.modules()) == ["head"]


def test_inference():
    """One segment: any number of steps, with eta. More, or scores distilled: their own steps, deterministic, and no others."""
    how = TSCD(steps=4).inference(VP)
    assert [round(hop.time * 999) for hop in how.hops] == [999, 749, 499, 249] and how.eta == 0
    assert len(TSCD().inference(VP, 3).hops) == 3 and TSCD(eta=0.3).inference(VP).eta == 0.3
    own = TSCD(segments=(8, 4), mix=(0.0, 0.0), steps=4)
    for schedule in (VP, FLOW, SHIFTED):
        how = own.inference(schedule)
        upper = [schedule.grid(own.grid)[k] for k in (48, 36, 24, 12)]  # where the segments begin
        assert [hop.time for hop in how.hops] == pytest.approx(upper, rel=1e-12) and how.eta is None and not how.renoise
        for steps in (1, 2, 3, 8):
            with pytest.raises(ValueError, match=f"made for 4 steps cannot take {steps}"):
                own.inference(schedule, steps)
    one = TSCD(score=True, steps=1)
    assert one.inference(VP).hops == trailing(VP.grid(1)) and one.inference(VP).eta is None
    with pytest.raises(ValueError, match="made for 1 steps"):
        one.inference(VP, 2)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"segments": ()}, "segments: [] says nothing"),
        ({"segments": (8, 3)}, "segments: 3 after 8; each number must divide"),
        ({"segments": (2, 4)}, "segments: 4 after 2"),
        ({"segments": (2, 2)}, "segments: 2 after 2"),
        ({"grid": 50}, "grid: 50 does not fall into 8 segments"),
        ({"mix": (0.1,)}, "mix: 1 shares for 4 stages"),
        ({"guidance": (6.0, 2.0)}, "guidance: [6.0, 2.0] is no range"),
        ({"segments": (8, 4), "steps": 2}, "steps: 2, but segments and score make a student for 4"),
        ({"segments": (8, 4), "score": True}, "score: scores are distilled into one step"),
        ({"score": True}, "steps: 4, but segments and score make a student for 1"),
        ({"segments": (8, 4), "eta": 0.3}, "eta: 0.3 is new noise, but a student made for 4 steps"),
        ({"score": True, "steps": 1, "eta": 1.0}, "eta: 1 is new noise, but a student made for 1 steps"),
    ],
)
def test_fields_are_checked_together(fields, told):
    shares = (0.0,) * len(fields.get("segments", TSCD().segments))
    problems = list(TSCD(**{"mix": shares, **fields}).check())
    assert any(problem.startswith(told) for problem in problems), problems
