"""A run as its user meets it: one command that goes on where it stopped, and refuses what it must."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import time

import pytest
import torch
from students import student

from stepdistill.cli import main
from stepdistill.errors import UserError
from stepdistill.loop import best
from stepdistill.recipe import load_recipe
from stepdistill.report.read import read_log
from stepdistill.runs import Run, train
from stepdistill.strategies import LCM

QUICK = (
    *("data.count=8", "train.batch=4", "train.steps=4", "train.save_every=2"),
    *("eval.every=2", "eval.n=0", "eval.watch=0", "eval.steps=[2, 1]"),
)


@pytest.fixture
def recipe_file(tmp_path, monkeypatch):
    student(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run" / "recipe.yaml"


def recipe(file, *overrides):
    return load_recipe(file, (*QUICK, *overrides))


def weights(run: Run) -> dict[str, torch.Tensor]:
    from stepdistill.checkpoint import load, newest

    return load(newest(run.checkpoints))[0]


def test_a_run_writes_what_the_contract_names_and_then_says_it_is_finished(recipe_file, capsys):
    run = train(recipe(recipe_file))
    assert run.folder.name == "tiny" and run.finished(recipe(recipe_file))
    lines = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {"seconds", "student/consistency", "student/grad_norm", "student/lr"} <= lines[0].keys()
    assert sorted(p.name for p in (run.folder / "samples").glob("*.png")) == ["000000.png", "000002.png", "000004.png"]
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["000002", "000004"]
    assert "stepdistill.load_pipeline" in (run.folder / "report.html").read_text()
    for name in ("pytorch_lora_weights.safetensors", "scheduler/scheduler_config.json", "stepdistill.json", "README.md"):
        assert (run.export / name).is_file()
    capsys.readouterr()
    assert train(recipe(recipe_file)).folder == run.folder
    assert "finished" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_saves_and_the_same_command_ends_as_if_it_had_not_stopped(recipe_file, monkeypatch, number):
    whole = train(recipe(recipe_file), "whole")
    honest = LCM.losses

    def losses(self, roles, batch, draw):
        if draw.step == 2:
            os.kill(os.getpid(), number)
        yield from honest(self, roles, batch, draw)

    monkeypatch.setattr(LCM, "losses", losses)
    command = ["train", str(recipe_file), *QUICK, "train.save_every=100", "--output", "stopped"]
    assert main(command) == 130
    monkeypatch.setattr(LCM, "losses", honest)
    stopped = Run(recipe_file.parents[1] / "stopped")
    assert stopped.step == 3
    assert main(command) == 0
    reached = weights(stopped)
    assert all(torch.equal(x, reached[name]) for name, x in weights(whole).items())
    steps = [json.loads(line)["step"] for line in (stopped.folder / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def test_another_recipe_in_the_same_folder_is_refused_by_key(recipe_file):
    train(recipe(recipe_file))
    with pytest.raises(UserError, match=r"train\.batch"):
        train(recipe(recipe_file, "train.batch=2"))
    longer = train(recipe(recipe_file, "train.steps=5", "eval.every=0", "train.save_every=1"))
    assert longer.step == 5


def test_never_moves_the_old_run_aside(recipe_file):
    run = train(recipe(recipe_file, "train.steps=2"))
    log = (run.folder / "log.jsonl").read_text()
    train(recipe(recipe_file, "train.steps=1"), resume="never")
    assert run.step == 1
    assert (run.folder.with_name("tiny.old-1") / "log.jsonl").read_text() == log


def test_resume_from_nowhere_is_refused(recipe_file):
    with pytest.raises(UserError, match="no checkpoint there"):
        train(recipe(recipe_file), resume="nowhere")


def test_divergence_ends_with_3_names_the_player_and_keeps_a_finite_state(recipe_file, monkeypatch, capsys):
    honest = LCM.losses

    def losses(self, roles, batch, draw):
        for who, loss, logs in honest(self, roles, batch, draw):
            yield who, loss / 0 if draw.step == 3 else loss, logs

    monkeypatch.setattr(LCM, "losses", losses)
    assert main(["train", str(recipe_file), *QUICK]) == 3
    said = capsys.readouterr().err
    assert "player student" in said and "step 3" in said
    run = Run(recipe_file.parents[1] / "runs" / "tiny")
    assert run.step == 3
    assert all(torch.isfinite(x).all() for x in weights(run).values())


def test_a_run_skips_scores_and_names_its_best_checkpoint_whatever_the_clock_says(recipe_file, monkeypatch, capsys):
    honest, jumps = LCM.losses, itertools.cycle([0.0, 3e7, -3e7])
    monkeypatch.setattr(time, "time", lambda: 1.7e9 + next(jumps))  # the clock goes to and fro by a year

    def losses(self, roles, batch, draw):
        for who, loss, logs in honest(self, roles, batch, draw):
            yield who, loss * math.nan if draw.step == 1 else loss, logs

    monkeypatch.setattr(LCM, "losses", losses)
    more = ("train.skip=1", "train.keep=3", "eval.watch=16", "optim.student_lr=1e-2")
    command = ["train", str(recipe_file), *QUICK, *more]
    assert main(command) == 0
    run = Run(recipe_file.parents[1] / "runs" / "tiny")
    lines = {line["step"]: line for line in map(json.loads, (run.folder / "log.jsonl").read_text().splitlines())}
    assert lines[2]["skipped"] == "the loss of player student" and "student/lr" not in lines[2]
    assert "step 2 is skipped: the loss of player student is not finite\n" in capsys.readouterr().err
    scores = {step: line["watch/score"] for step, line in lines.items() if "watch/score" in line}
    assert scores.keys() == {2, 4}
    metas = [json.loads((run.checkpoints / f"{step:06d}" / "state.json").read_text()) for step in scores]
    assert [meta["score"] for meta in metas] == list(scores.values()) and [meta["skips"] for meta in metas] == [1, 0]
    seconds = [line["seconds"] for line in lines.values()]
    assert seconds == sorted(seconds) and seconds[0] >= 0 and seconds[-1] < 600
    curves, _ = read_log(run.folder / "log.jsonl")
    assert curves["student/lr"][0] == [1, 3, 4] and "skipped" not in curves

    log = run.folder / "log.jsonl"
    for better, told in ((2, f"stepdistill export {run.folder} --checkpoint 2"), (4, "")):
        for step, line in lines.items():
            line["watch/score"] = float(step != better)
        log.write_text("".join(json.dumps(line) + "\n" for line in lines.values()))
        said = "".join(best(run.folder, 4))
        assert said.endswith(told) and bool(told) == bool(said)


def test_an_adapter_that_changes_nothing_is_named(recipe_file, capsys):
    train(recipe(recipe_file, "optim.student_lr=1e-30"))
    assert "still equals the teacher" in capsys.readouterr().err


def test_a_refused_run_leaves_no_folder(recipe_file, capsys):
    output = recipe_file.parent / "refused"
    assert main(["train", str(recipe_file), "model.source=org/absent", "--output", str(output)]) == 2
    assert "org/absent" in capsys.readouterr().err and not output.exists()
