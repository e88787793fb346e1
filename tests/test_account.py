"""What a run took: every second of it has a name, over all starts, however each of them ended."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from test_timing import timed

from stepdistill.account import FILE, Account, accounted, read, table
from stepdistill.errors import Diverged
from stepdistill.report.read import read_log
from stepdistill.runs import train
from stepdistill.show import Line


def began(folder: Path, at: int = 0):
    clock, times = timed()
    return clock, Account(folder, times, at, of=10, batch=4)


def held(folder: Path) -> dict:
    return json.loads((folder / FILE).read_text())


ANSI, NAN = (f'{{"steps": 1, "starts": 1, "spent": {{{spent}}}}}' for spent in ('"\\u001b[2J": 1', '"x": NaN'))
ENDS = {KeyboardInterrupt: "stopped", RuntimeError: "failed"}


@pytest.mark.parametrize("error", [None, KeyboardInterrupt(), Diverged("critic", "the loss", 3, Path("x")), RuntimeError()])
def test_however_a_run_ends_its_summary_says_so(tmp_path, error, capsys):
    clock, account = began(tmp_path)
    try:
        with accounted(account, Line()):
            clock.time = 2
            account.times.lap("student")
            account.told(at=5)
            clock.time = 3
            account.times.lap("saving")
            if error:
                raise error
    except BaseException as raised:
        assert raised is error
    made = held(tmp_path)
    ended = "diverged" if isinstance(error, Diverged) else ENDS.get(type(error), "finished")
    assert made["ended"] == ended and (made["step"], made["of"], made["steps"], made["starts"]) == (5, 10, 5, 1)
    assert made["spent"] == {"student": 2, "saving": 1, "other": 0} and made["seconds"] == 3
    assert capsys.readouterr().err.startswith(f"{ended} at step 5 of 10: 5 steps in 0:03, 0.4 s a step, 10 samples/s\n")


def test_starts_add_up_and_a_kill_costs_what_was_not_saved(tmp_path):
    clock, account = began(tmp_path)
    for step in (1, 2, 3):
        clock.time += 1
        account.times.lap("student")
        account.told(step)
        if step == 2:
            account.write()  # with the checkpoint; then the process is killed
    assert held(tmp_path)["ended"] == "running"
    clock, account = began(tmp_path, at=2)
    clock.time = 8
    account.times.lap("critic")
    account.told(6)
    made = account.write("finished")
    assert made == held(tmp_path)
    assert made["spent"] == {"critic": 8, "student": 2, "other": 0} and next(iter(made["spent"])) == "critic"
    assert (made["steps"], made["starts"], made["seconds"]) == (6, 2, 10) and made["last"]["steps"] == 4


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"spent": 3}', '{"steps": 1, "starts": 1, "spent": {"x": "y"}}', "\ud800", ANSI, NAN]
)
def test_a_damaged_summary_is_begun_anew(tmp_path, text):
    (tmp_path / FILE).write_bytes(text.encode("utf-8", "surrogatepass"))
    assert read(tmp_path / FILE) == {}


def test_a_full_disk_hides_neither_the_table_nor_what_ended_the_run(tmp_path, monkeypatch, capsys):
    def full(self, *_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    _, account = began(tmp_path)
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(KeyboardInterrupt), accounted(account, Line()):
        raise KeyboardInterrupt
    said = capsys.readouterr().err
    assert "could not be written" in said and "stopped at step 0 of 10: 0 steps in 0:00" in said


def test_the_table():
    last = {"steps": 4, "seconds": 100.0, "spent": {"student": 60.0, "evaluation": 20.0, "data": 0.05, "other": 19.95}}
    made = {"ended": "stopped", "step": 8, "of": 10, "batch": 2, "starts": 1, **last, "last": last}
    assert table(made).splitlines() == [
        "stopped at step 8 of 10: 4 steps in 1:40, 20 s a step, 0.1 samples/s",
        "  student             1:00   60.0%",
        "  evaluation          0:20   20.0%",
        "  other               0:20   19.9%",
    ]
    made |= {"starts": 3, "seconds": 200.0, "spent": {"student": 120.0, "preparing": 80.0}}
    assert table(made).splitlines()[1:] == [
        "                         this time     of all 3 starts",
        "  student             1:00   60.0%        2:00   60.0%",
        "  preparing           0:00    0.0%        1:20   40.0%",
    ]


def test_every_second_of_a_run_has_a_name(tmp_path, monkeypatch):
    """And curves are those of players alone."""
    from students import student

    student(tmp_path, strategy="{name: dmd2, student_every: 2}")
    monkeypatch.chdir(tmp_path)
    from stepdistill.recipe import load_recipe

    quick = ("data.count=8", "train.batch=4", "train.save_every=2", "eval.every=2", "eval.n=0", "eval.steps=[1]")
    run = train(load_recipe("run/recipe.yaml", (*quick, "train.steps=2")))
    lines = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    made = held(run.folder)
    assert (made["steps"], made["starts"], made["step"], made["ended"]) == (2, 1, 2, "finished")
    assert {"data", "student", "critic", "other", "preparing", "evaluation"} == lines[0]["spent"].keys()
    assert {"data", "critic", "other"} == lines[1]["spent"].keys() - {"saving", "evaluation"}  # the student does not move
    assert set(made["spent"]) == {"data", "student", "critic", "evaluation", "saving", "preparing", "other"}
    for name in ("data", "student", "critic"):  # nothing of what a step takes is outside the log
        assert made["spent"][name] == pytest.approx(sum(line["spent"].get(name, 0) for line in lines), abs=2e-3)
    assert all("/" in name for name in read_log(run.folder / "log.jsonl")[0])
    assert torch.accelerator.is_available() or "peak_mib" not in lines[0]
