"""Full disks, damaged and read-only folders, signals, and two trainings in one folder, as the user meets them."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import shutil
import signal
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch
from processes import start, world
from students import student

from stepdistill import checkpoint, distributed, export, files, runs, verbs
from stepdistill.assemble import restore
from stepdistill.cli import main
from stepdistill.evaluate.grid import Samples, forget
from stepdistill.lock import LOCK, held
from stepdistill.recipe import load_recipe
from stepdistill.runs import Run
from stepdistill.show import Line, Log
from stepdistill.strategies import LCM

QUICK = (
    *("data.count=8", "train.batch=4", "train.steps=4", "train.save_every=1", "train.trackers=[]"),
    *("eval.every=0", "eval.n=0", "eval.steps=[1]"),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a recipe and a finished run of it."""
    folder = tmp_path_factory.mktemp("trained")
    student(folder)
    assert main(["train", str(folder / "run" / "recipe.yaml"), *QUICK, "--output", str(folder / "whole")]) == 0
    return folder


@pytest.fixture
def place(trained, tmp_path, monkeypatch):
    """A copy of that run in `here`, and the command that made it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained / "whole", tmp_path / "here")
    shutil.copytree(trained / "cache", tmp_path / "cache")
    return ["train", str(trained / "run" / "recipe.yaml"), *QUICK, "--output", "here"]


def spoil(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def tensors(folder):
    return dict(checkpoint.load(checkpoint.newest(Path(folder) / "checkpoints"))[0])


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(x, other[name]) for name, x in one.items())


def test_a_damaged_newest_checkpoint_is_named_and_the_run_ends_the_same(place, trained, capsys):
    spoil(Path("here/checkpoints/000004/state-0001.safetensors"))
    assert restore(Path("here")).recipe.train.steps == 4
    assert "000004 is damaged (state-0001.safetensors is not what was written)" in capsys.readouterr().err
    assert main(place) == 0
    said = capsys.readouterr().err
    assert "000004 is damaged" in said and "going on from here/checkpoints/000003 at step 3" in said
    assert same(tensors("here"), tensors(trained / "whole"))
    assert sorted(os.listdir("here/checkpoints")) == ["000003", "000004", "000004.unused-1"]


def test_where_no_checkpoint_is_whole_nothing_begins(place, capsys):
    for step in (3, 4):
        spoil(Path(f"here/checkpoints/00000{step}/state.json"))
    assert main(place) == 2
    assert "no checkpoint is whole" in capsys.readouterr().err
    assert sorted(os.listdir("here/checkpoints")) == ["000003", "000004"] and not Path("here", LOCK).exists()
    assert main([*place, "--resume", "here/checkpoints/000003"]) == 2
    assert "000003 is damaged (state.json is not what was written)" in capsys.readouterr().err


def test_an_earlier_checkpoint_that_is_asked_for_is_gone_on_from_and_later_ones_never_are(place, trained, capsys):
    Path("here/samples/pictures/000004/student-1steps").mkdir(parents=True)
    for name in ("000003", "000004"):
        Path(f"here/samples/{name}.png").touch()
    assert main([*place, "--resume", "here/checkpoints/000003"]) == 0
    assert "set aside what this training does not go on from: here/checkpoints/000004.unused-1" in capsys.readouterr().err
    assert same(tensors("here"), tensors(trained / "whole"))
    assert os.listdir("here/samples") == ["000003.png", "pictures"] and os.listdir("here/samples/pictures") == []


def test_samples_of_later_steps_are_forgotten_and_nothing_else(tmp_path):
    for name in ("000002.png", "000010.png", "note.png", "pictures/teacher/a.png", "pictures/000010/a.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    forget(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.rglob("*.*")) == ["000002.png", "a.png", "note.png"]
    forget(tmp_path / "absent", 2)


def test_randomness_is_of_seed_step_and_sample_alone(place, trained, monkeypatch):
    """Whatever the generators of torch, numpy and Python are at, and are asked for meanwhile."""
    honest = LCM.losses

    def losses(self, roles, batch, draw):
        yield from honest(self, roles, batch, draw)
        torch.rand(draw.step + 1), np.random.rand(), random.random()

    monkeypatch.setattr(LCM, "losses", losses)
    for module in (torch.manual_seed, np.random.seed, random.seed):
        module(1234)
    shutil.rmtree("here/checkpoints/000004")
    assert main(place) == 0
    assert same(tensors("here"), tensors(trained / "whole"))


def test_a_folder_that_is_trained_in_is_left_alone(place, capsys):
    Path("here/report.html").unlink()
    before = sorted(os.listdir("here"))
    with held(Path("here")):
        for how in ("auto", "never", "here/checkpoints/000003"):
            assert main([*place, "--resume", how]) == 2
            assert f"here is being trained in by process {os.getpid()} on " in capsys.readouterr().err
        assert not Path("here.old-1").exists() and sorted(os.listdir("here")) == sorted([LOCK, *before])
    assert main([*place, "--resume", "never"]) == 0
    assert sorted(os.listdir("here.old-1")) == before and not Path("here", LOCK).exists()


def test_a_run_that_was_stopped_while_it_was_measured_is_not_finished(place, monkeypatch, capsys):
    Path("here/report.html").unlink()

    def interrupt(*_):
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "evaluate", interrupt)
        assert main([*place, "eval.n=8"]) == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    assert main(place) == 0
    assert "report: " in capsys.readouterr().err
    assert main(place) == 0
    assert "is finished" in capsys.readouterr().err


PLACES = ("prompts", "assemble", "grid", "export", "saving")
SIGNALS = [(where, number) for where in PLACES for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.parametrize(
    ("where", "number"),
    [pytest.param(*one, marks=pytest.mark.long if one != ("grid", signal.SIGINT) else ()) for one in SIGNALS],
)
def test_a_signal_anywhere_leaves_with_130_and_what_is_whole(place, trained, monkeypatch, where, number):
    """In the grid and while saving it is a wish: the run saves at the end of its step, and stops."""

    def first(honest):
        def interrupted(*args, **named):
            if not sent:
                sent.append(number)
                os.kill(os.getpid(), number)
            return honest(*args, **named)

        return interrupted

    sent, overrides = [], []
    shutil.rmtree("here")
    with monkeypatch.context() as patch:
        if where == "prompts":
            patch.setattr(runs, "build_batches", first(runs.build_batches))
        elif where == "assemble":
            patch.setattr(runs, "assemble", first(runs.assemble))
        elif where == "grid":
            overrides = ["eval.every=1"]
            honest = Samples.__call__
            patch.setattr(Samples, "__call__", lambda self, step: (first(honest) if step else honest)(self, step))
        elif where == "export":
            patch.setattr(runs, "write_export", first(runs.write_export))
        else:
            patch.setattr(checkpoint, "seal", first(checkpoint.seal))
        before = signal.getsignal(signal.SIGTERM)
        assert main([*place, *overrides]) == 130 and sent and signal.getsignal(signal.SIGTERM) == before
    saved = {"prompts": 0, "assemble": 0, "grid": 1, "export": 4, "saving": 2}[where]
    assert Run(Path("here")).step == saved and not Path("here", LOCK).exists() and not Path("here/export").exists()
    assert main([*place, *overrides]) == 0
    assert same(tensors("here"), tensors(trained / "whole"))


def asked_twice(argv):
    """The second signal comes inside saving."""
    honest = checkpoint.seal

    def seal(*args):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        (Path(argv[-1]) / "too-late").touch()
        honest(*args)

    checkpoint.seal = seal
    return main(argv)


@pytest.mark.long
def test_a_second_signal_leaves_at_once_and_without_harm(place, trained):
    shutil.rmtree("here/checkpoints/000004")
    process = start(asked_twice, [*place[:-1], str(Path("here").resolve())])
    process.join()
    assert process.exitcode == 130 and not Path("here/too-late").exists() and Run(Path("here")).step == 3
    assert main(place) == 0
    assert same(tensors("here"), tensors(trained / "whole")) and sorted(os.listdir("here/checkpoints")) == ["000003", "000004"]


def one_is_asked(argv, number):
    """Of two processes that train together, the second one hears a signal."""
    honest = LCM.losses

    def losses(self, roles, batch, draw):
        if draw.step == 1 and distributed.rank() == 1:
            os.kill(os.getpid(), number)
        yield from honest(self, roles, batch, draw)

    LCM.losses = losses
    return main(argv)


@pytest.mark.long
def test_processes_that_train_together_stop_at_one_step(trained, tmp_path):
    argv = ["train", str(trained / "run" / "recipe.yaml"), *QUICK, "train.save_every=100", "--output", str(tmp_path / "two")]
    assert world(2, one_is_asked, argv, signal.SIGTERM, seconds=300) == [130, 130]
    assert Run(tmp_path / "two").step == 2
    assert len((tmp_path / "two" / "log.jsonl").read_text().splitlines()) == 2
    assert main(argv) == 0
    assert Run(tmp_path / "two").step == 4 and not (tmp_path / "two" / LOCK).exists()


def full(*_args, **_named):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_ends_a_training_with_2_and_its_last_checkpoint(place, trained, monkeypatch, capsys):
    shutil.rmtree("here/checkpoints/000004")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "seal", full)
        assert main(place) == 2
    said = capsys.readouterr().err
    assert "no checkpoint could be written (No space left on device); one needs" in said
    assert "here/checkpoints/000003" in said and "Traceback" not in said
    assert os.listdir("here/checkpoints") == ["000003"]
    assert main(place) == 0
    assert same(tensors("here"), tensors(trained / "whole"))


def test_a_disk_too_small_for_a_checkpoint_is_refused_before_any_work(place, monkeypatch, capsys):
    shutil.rmtree("here")
    monkeypatch.setattr(files, "free", lambda _: 1000)
    monkeypatch.setattr(runs, "build_batches", lambda *_: pytest.fail("it began"))
    assert main(place) == 2
    assert "a checkpoint needs" in capsys.readouterr().err and not Path("here").exists()


class Full:
    """A file on a full disk."""

    write = flush = close = full


def test_samples_and_a_log_that_a_full_disk_refuses_are_told_and_training_goes_on(place, trained, monkeypatch, capsys):
    for step in (3, 4):
        shutil.rmtree(f"here/checkpoints/00000{step}")
    honest = Log.__init__
    monkeypatch.setattr(
        Log, "__init__", lambda self, *args: (honest(self, *args), self.file.close(), setattr(self, "file", Full()))[0]
    )
    monkeypatch.setattr(Samples, "__call__", full)
    assert main([*place, "eval.every=2"]) == 0
    said = capsys.readouterr().err
    assert "warning: no samples of step 2 could be written" in said
    assert said.count("log.jsonl cannot be written (No space left on device)") == 1
    assert same(tensors("here"), tensors(trained / "whole"))


def test_log_lines_wait_for_a_full_disk_and_none_is_cut(tmp_path, capsys):
    line = Line()
    log = Log(tmp_path, 0, line)
    raw = log.file.raw

    class Disk:
        """Takes so many bytes yet."""

        room = 100

        def write(self, data):
            if self.room == 0:
                full()
            taken = raw.write(bytes(data)[: self.room])
            self.room -= taken
            return taken

        def __getattr__(self, name):
            return getattr(raw, name)

    class Raw(Disk, io.RawIOBase):
        def writable(self):
            return True

    disk = Raw()
    kept, log.file = log.file, io.BufferedWriter(disk, 2**20)
    for step in range(1, 20):
        log(step, 0.5, {"student/loss": 1 / step})
    assert capsys.readouterr().err.count("log.jsonl cannot be written (No space left on device)") == 1
    disk.room = 10**6
    log(20, 0.5, {})
    assert [json.loads(text)["step"] for text in (tmp_path / "log.jsonl").read_text().splitlines()] == list(range(1, 21))
    log.close(), kept.close()


@pytest.mark.parametrize("cut", ['{"step": 3, "sec', "[]", "7", "{}", "\x00\x00", "{}}"])
def test_a_log_line_that_was_cut_is_dropped(tmp_path, cut):
    lines = [json.dumps({"step": step}) for step in (1, 2, 3)]
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, cut]))
    Log(tmp_path, 2, Line()).close()
    assert (tmp_path / "log.jsonl").read_text().splitlines() == lines[:2]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
@pytest.mark.parametrize("verb", ["train", "validate", "cp", "export"])
def test_no_disk_gives_a_traceback(monkeypatch, capsys, verb, number):
    def refuse(_args):
        raise OSError(number, os.strerror(number), "some/file")

    monkeypatch.setattr(verbs, verb, refuse)
    assert main([verb, "a", *(["b"] if verb == "cp" else [])]) == 2
    said = capsys.readouterr().err
    assert said == f"some/file: {os.strerror(number)}; {files.REMEDIES[number]}\n"


def test_a_read_only_folder_is_refused_before_any_work(place, monkeypatch, capsys):
    Path("here/report.html").unlink()

    def refuse(*_args, **_named):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    monkeypatch.setattr(runs, "assemble", lambda *_: pytest.fail("it began"))
    assert main(place) == 2
    assert "here cannot be written (Read-only file system); give another folder with --output" in capsys.readouterr().err


def test_a_disk_that_refuses_the_export_leaves_the_old_one(place, monkeypatch, capsys):
    before = {path: path.read_bytes() for path in Path("here/export").rglob("*.*") if path.is_file()}
    monkeypatch.setattr(export, "compare", full)
    assert main(["export", "here"]) == 2
    assert "here/export: No space left on device; make room" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path("here/export").rglob("*.*") if path.is_file()} == before
    assert not [path for path in Path("here").iterdir() if path.name.startswith(".")]


def test_a_finished_run_says_so_where_nothing_can_be_written(place, monkeypatch, capsys):
    monkeypatch.setattr(runs, "held", lambda _: pytest.fail("a lock was taken"))
    assert main(place) == 0
    assert "here is finished (4 steps)" in capsys.readouterr().err
    assert load_recipe("here/recipe.yaml", data=False).train.steps == 4
