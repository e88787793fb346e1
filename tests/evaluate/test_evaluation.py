"""Whole evaluations of small students: the result file, what is not measured again, and figures whatever made them."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from processes import world
from students import student

from stepdistill import checkpoint
from stepdistill.errors import UserError
from stepdistill.evaluate import bench, evaluation, results, speed
from stepdistill.evaluate.candidates import read_against, source
from stepdistill.evaluate.measure import VARIED, Asked, Suite
from stepdistill.evaluate.meters import Colour, Shown, Variety
from stepdistill.evaluate.pictures import save_prompts
from stepdistill.evaluate.rivals import best_known
from stepdistill.sections import Model
from stepdistill.show import Line

TOLD = ("ms", "ms_low", "ms_high", "memory_mib", "machine", "key")  # of a row, besides its figures


def suite(n=10):
    plain = Asked([f"a picture {i}" for i in range(n)], (Colour(), Shown(3)))
    return Suite("small", {"plain": plain, "varied": Asked(["a"] * 4, (Variety(2, None, lpips=False),), VARIED, 2)})


def compared(made, folder, n=10, **options):
    given = {"steps": (1,), "against": ("teacher@2",), "batch": 64} | options
    return evaluation.compare(made, suite(n), folder, Line(), given["batch"], given["steps"], given["against"])


def quality(row):
    return {name: value for name, value in row.items() if name not in TOLD}


def same(one, other):
    """Figures agree to 1e-3; names and counts exactly."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert other[name] == (pytest.approx(value, rel=1e-3, abs=1e-6) if isinstance(value, float) else value), name


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr("stepdistill.evaluate.speed.CALLS", 3)


def test_a_student_beside_its_teacher(tmp_path, quick, monkeypatch, capsys):
    made = student(tmp_path)
    rows = compared(made, tmp_path / "eval")
    teacher, own = rows
    assert (teacher["who"], teacher["steps"], own["who"], own["steps"], own["nfe"]) == ("teacher", 2, "student", 1, 1)
    assert teacher["fidelity"] == 0 < own["fidelity"]
    assert own["ms_low"] <= own["ms"] <= own["ms_high"] and own["memory_mib"] > 10
    result = results.read(tmp_path / "eval/small.json")
    assert result["rows"] == json.loads(json.dumps(rows)) and result["provenance"]["compared"]["n"] == 10
    shown = tmp_path / "eval/pictures"
    assert sorted(file.name for file in (shown / "student-1steps").glob("*.png")) == [f"0000{k}.png" for k in range(3)]
    assert json.loads((shown / "prompts.json").read_text()) == [f"a picture {i}" for i in range(3)]
    assert not (tmp_path / "eval/kept").exists()
    assert "student, 1 step" in capsys.readouterr().err

    monkeypatch.setattr(bench, "draw", lambda *_: pytest.fail("it was measured already"))
    assert compared(made, tmp_path / "eval") == result["rows"]
    monkeypatch.undo()
    again = compared(made, tmp_path / "other", batch=3)
    for before, after in zip(rows, again, strict=True):
        same(quality(before), quality(after))


def test_nearness_to_another_teacher_and_another_machine_s_speed_are_measured_anew(tmp_path, quick, monkeypatch):
    made, drawn = student(tmp_path), []
    _, own = compared(made, tmp_path / "eval")
    really = bench.draw
    monkeypatch.setattr(bench, "draw", lambda place, one: drawn.append(one.label) or really(place, one))
    teacher, again = compared(made, tmp_path / "eval", against=("teacher@3:unguided:ddim",))
    assert drawn == ["teacher, 3 steps, unguided"]
    assert [one["apart_from"] for one in (own, teacher, again)] == [
        "teacher, 2 steps, guided 11, UniPC",
        *2 * ["teacher, 3 steps, unguided, first order"],
    ]
    assert teacher["fidelity"] == 0 and again["fidelity"] != own["fidelity"]
    fresh = compared(made, tmp_path / "other", against=("teacher@3:unguided:ddim",))[1]
    assert again["fidelity"] == pytest.approx(fresh["fidelity"], abs=1e-6)
    assert again["ms"] == own["ms"] and again["saturation"] == own["saturation"]

    path, drawn[:] = tmp_path / "eval/small.json", []
    result = results.read(path)
    slow = [row | {"ms": -1.0, "machine": "another"} for row in result["rows"]]
    results.write(path, slow, result["provenance"])
    rows = compared(made, tmp_path / "eval", against=("teacher@3:unguided:ddim",))
    assert drawn == [] and all(row["ms"] > 0 and row["machine"] == own["machine"] for row in rows)


def test_other_weights_and_other_protocols_are_measured_anew(tmp_path, quick):
    made = student(tmp_path)
    old = compared(made, tmp_path / "eval", against=("none",))
    for p in made.students()["student"].parameters():
        p.data.add_(0.1)
    new = compared(made, tmp_path / "eval", against=("none",))
    assert [row["who"] for row in new] == ["student"] and new[0]["key"] != old[0]["key"]
    assert new[0]["saturation"] != old[0]["saturation"]
    compared(made, tmp_path / "eval", n=11, against=("none",))
    assert sorted(file.name for file in (tmp_path / "eval").glob("small*")) == ["small.json", "small.json.old-1"]


def test_another_lora_of_the_same_name_is_another_teacher(tmp_path):
    file = tmp_path / "style.safetensors"
    file.write_bytes(b"one")
    model = Model("org/name", loras=(str(file),))
    of = SimpleNamespace(recipe=SimpleNamespace(model=model, train=SimpleNamespace(precision="no")))
    before = source(of)
    assert source(of) == before
    file.write_bytes(b"other")
    assert source(of) != before


def test_words_for_teachers(tmp_path):
    made = student(tmp_path)
    best = {(4, 1.0): "DPM-Solver++"}
    read = {word: read_against(made, word, best) for word in ("teacher@4:unguided", "teacher@25:7.5:ddim", "teacher@4:1:unipc")}
    found = {word: (one.steps, one.guidance, one.solver, one.nfe) for word, one in read.items()}
    assert found["teacher@4:unguided"] == (4, 1.0, "DPM-Solver++", 4)
    assert found["teacher@25:7.5:ddim"] == (25, 7.5, "first order", 50)
    assert found["teacher@4:1:unipc"] == (4, 1.0, "UniPC", 4)
    for wrong in ("teacher", "teacher@0", "student@4", "teacher@4:best", "teacher@x"):
        with pytest.raises(UserError, match=rf"--against {wrong} names no teacher; write teacher@STEPS"):
            read_against(made, wrong, {})


def test_bad_wishes_are_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(UserError, match="--preset nothing is none"):
        evaluation.evaluate_run(tmp_path, preset="nothing")
    with pytest.raises(UserError, match="tiny has its own prompts"):
        evaluation.evaluate_run(tmp_path, preset="tiny", reference="photos")


def measured_again(run):
    """One of several processes."""
    speed.CALLS = 3
    evaluation.evaluate_run(run, against=("none",), batch=7)


@pytest.mark.long
def test_real_processes_and_an_interruption_change_no_figure(tmp_path, quick):
    """The embedded world's preset by one process in batches of 64, by two in batches of 7, and by two runs of one."""
    over = ["data.prompts=stepdistill/tiny", "eval.n=80", "eval.steps=[1]"]
    made = student(tmp_path, "stepdistill/tiny-sd", *over)
    run = tmp_path / "run"
    checkpoint.save(run / "checkpoints", 1, made.tensors(), {}, 1)
    (whole,) = evaluation.evaluate_run(run, against=("none",))
    (run / "eval").rename(run / "whole")

    world(2, measured_again, run, seconds=600)
    (two,) = results.read(run / "eval/tiny.json")["rows"]
    same(quality(whole), quality(two))
    (run / "eval").rename(run / "two")

    asked = []
    sampled = bench.Bench.sampler

    def stops(self, candidate):
        sample = sampled(self, candidate)

        def some(captions, first):
            asked.append(first)
            if len(asked) == 3:
                raise KeyboardInterrupt
            return sample(captions, first)

        return some

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.Bench, "sampler", stops)
        with pytest.raises(KeyboardInterrupt):
            evaluation.evaluate_run(run, against=("none",))
        (resumed,) = evaluation.evaluate_run(run, against=("none",))
    made = asked[:-1]  # the last are the teacher's, to compare with
    assert made[2] == made[3] and len(set(made)) == len(made) - 1
    same(quality(whole), quality(resumed))
    assert np.isfinite(resumed["fd"])


def test_a_solver_that_was_only_asked_for_is_not_taken_for_the_best():
    rows = [{"who": "teacher", "steps": 4, "guidance": 1.0, "solver": "UniPC", "tried": {}}]
    asked = {"who": "teacher", "steps": 4, "guidance": 1.0, "solver": "first order"}
    assert best_known([*rows, asked, {"who": "student", "steps": 4}]) == {(4, 1.0): "UniPC"}


def test_pictures_of_other_prompts_and_of_other_noise_are_removed(tmp_path):
    folder = tmp_path / "pictures"
    for prompts, seed, stays in ((["a"], 0, True), (["b"], 0, False), (["b"], 1, False)):
        (folder / "student-2steps").mkdir(parents=True, exist_ok=True)
        save_prompts(folder, prompts, seed)
        assert (folder / "student-2steps").exists() == stays
        assert sorted(path.name for path in folder.glob("*.json")) == ["prompts.json", "seed.json"]
