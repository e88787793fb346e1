"""A student beside its teacher while it trains: figures, warnings, and their end."""

from __future__ import annotations

import io

import pytest
import torch
from students import student

from stepdistill.evaluate import watching
from stepdistill.evaluate.colour import COLOURS, colour
from stepdistill.evaluate.looks import GROUPS
from stepdistill.evaluate.watching import Watching
from stepdistill.show import Line


@pytest.fixture
def made(tmp_path, monkeypatch):
    monkeypatch.setattr(watching, "TEACHER_STEPS", 2)
    return student(tmp_path, "eps", "eval.watch=16", strategy="{name: dmd2, guidance: 2, steps: 2}")


def test_the_same_pictures_each_time_several_of_a_prompt_the_teachers_once(made, monkeypatch):
    watch, drawn = Watching(made, Line(io.StringIO())), []
    honest = Watching.pictures
    monkeypatch.setattr(Watching, "pictures", lambda self, walk: drawn.append(honest(self, walk)) or drawn[-1])
    first, second = watch(1), watch(2)
    assert first == second and len(drawn) == 3  # the teacher, and the student twice
    assert len(watch.some) == 2 and watch.each == 8 and {len(some) for some in drawn} == {16}
    for name, value in zip(COLOURS, colour(drawn[1]).mean(0), strict=True):
        assert first[f"watch/{name}"] == pytest.approx(value)
    with torch.no_grad():
        for p in made.roles.student.parameters():
            p.mul_(4)
    assert watch(3) != first


def test_nobody_watches_where_none_is_asked_for(tmp_path):
    made = student(tmp_path, "eps", "eval.watch=0")
    made.family.encode_prompts = None
    assert Watching(made, Line(io.StringIO()))(1) == {}


def test_a_student_that_leaves_its_teacher_is_told_once_until_it_is_back(made, monkeypatch):
    said = io.StringIO()
    watch = Watching(made, Line(said))
    honest, by = watching.looks, {"shift": 0.0}

    def shifted(pictures):
        rows = honest(pictures)
        rows[:, GROUPS[0]] += by["shift"]  # saturation
        return rows

    monkeypatch.setattr(watching, "looks", shifted)
    scores = [watch(1)["watch/score"]]
    quiet = said.getvalue()
    for by["shift"] in (1.0, 1.0, 0.0, 1.0, -1.0):
        scores.append(watch(2)["watch/score"])
    warnings = [line for line in said.getvalue().removeprefix(quiet).splitlines() if "saturation" in line]
    assert [("too high" in line, "too low" in line) for line in warnings] == [(True, False), (True, False), (False, True)]
    assert "lower strategy.guidance, which is 2, or lower optim.student_lr" in warnings[0]
    assert scores[0] == scores[3] < scores[1] == scores[2] == scores[4]


def test_a_student_whose_pictures_are_all_alike_is_told(made, monkeypatch):
    said = io.StringIO()
    watch = Watching(made, Line(said))
    honest = Watching.pictures
    watch(1)
    monkeypatch.setattr(Watching, "pictures", lambda self, walk: honest(self, walk)[:1].repeat(16, 0))
    assert watch(2)["watch/diversity"] == 0
    assert "the diversity of the student's pictures, 0, is too low" in said.getvalue()
    assert "raise strategy.student_every, which is 5" in said.getvalue()
