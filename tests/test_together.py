"""Whole runs of several processes: from the recipe to the report, with and without shares."""

import errno
import json
import os
import signal

import pytest
import torch
from processes import endings, world
from safetensors.torch import load_file
from several import Damped, prepare
from students import PROMPTS

from stepdistill import distributed, runs
from stepdistill.cli import main
from stepdistill.errors import UserError
from stepdistill.evaluate import grid
from stepdistill.recipe import load_recipe
from stepdistill.runs import Run, train
from stepdistill.strategies import LCM

SHOWN = (
    *("train.steps=2", "train.batch=4", "train.save_every=1", "train.trackers=[]"),
    *("eval.every=1", "eval.watch=16", "eval.n=0", "eval.steps=[1]", f"eval.prompts={json.dumps(PROMPTS)}"),
)


QUIET = ("train.steps=4", "train.batch=4", "train.save_every=1", "train.trackers=[]", "eval.every=0", "eval.n=0")


def run(recipe, output, overrides):
    """`stepdistill train` in this process, which is nobody else's; returns nothing."""
    runs.Trainer = Damped
    train(load_recipe(recipe, overrides), output)


def files(folder):
    return {str(file.relative_to(folder)) for file in folder.rglob("*")}


WHOLE = {
    "lcm that is told guidance": ("lcm", "eps", ("strategy.embed_guidance=2",)),
    "dmd2 of two experts": ("dmd2", "wan", ("data.resolution=32", "data.frames=5", "data.images=null", "strategy.gan=0")),
    "reflow, which makes pairs": (
        "reflow",
        "eps",
        ("data.images=null", "pairs={count: 6, shard: 2, steps: 2}", "train.ema=0.9"),
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("case", WHOLE)
def test_a_run_in_shares_is_shown_watched_and_exported_as_one_that_is_not(tmp_path, case):
    """Nobody draws, saves or gathers alone, or all would wait for each other; and what is exported is the same."""
    strategy, teacher, overrides = WHOLE[case]
    recipe = prepare(tmp_path, strategy, teacher, "lora=null", *overrides)
    world(1, run, recipe, tmp_path / "alone", SHOWN, seconds=200)
    world(2, run, recipe, tmp_path / "shares", ("train.shard=full", *SHOWN), seconds=200)
    assert (tmp_path / "shares" / "report.html").is_file()
    assert files(tmp_path / "alone") == files(tmp_path / "shares")
    for file in (tmp_path / "alone" / "export").rglob("*.safetensors"):
        mine, theirs = load_file(file), load_file(tmp_path / "shares" / file.relative_to(tmp_path / "alone"))
        assert mine.keys() == theirs.keys()
        for name, x in mine.items():
            assert torch.allclose(x, theirs[name], rtol=0, atol=1e-5), name


def run_without_room_for_pictures(recipe, output, overrides):
    """The first process, which alone writes them, cannot."""

    def full(folder, _pictures):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

    grid.keep_pictures = full
    run(recipe, output, overrides)


@pytest.mark.long
def test_in_shares_a_disk_without_room_for_pictures_holds_nobody_up(tmp_path):
    recipe, out = prepare(tmp_path, "lcm"), tmp_path / "out"
    world(2, run_without_room_for_pictures, recipe, out, ("train.shard=full", *SHOWN), seconds=100)
    assert Run(out).step == 2 and (out / "report.html").is_file() and not list(out.glob("samples/*.png"))


FAILURES = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "mistake": lambda: (_ for _ in ()).throw(UserError("pictures/7.png has vanished")),
    "bug": lambda: 1 / 0,
}


def training_in_which_one_fails(argv, log, failing, how):
    """The command line, of which one process meets its end in the third iteration; all speak into one file."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(out, stream)
    honest = LCM.losses

    def losses(self, roles, batch, draw):
        if draw.step == 2 and distributed.rank() == failing:
            FAILURES[how]()
        yield from honest(self, roles, batch, draw)

    LCM.losses = losses
    return main(argv)


@pytest.mark.long
@pytest.mark.parametrize(("failing", "shard"), [(0, "full"), (1, "null")])
@pytest.mark.parametrize(("how", "status"), [("killed", -signal.SIGKILL), ("mistake", 2), ("bug", 1)])
def test_one_that_dies_ends_all_and_has_the_first_word(tmp_path, how, status, failing, shard):
    recipe, log = prepare(tmp_path, "lcm"), tmp_path / "log"
    argv = ["train", str(recipe), *QUIET, f"train.shard={shard}", "--output", str(tmp_path / "run-of-two")]
    ended = endings(2, training_in_which_one_fails, argv, log, failing, how, seconds=60)
    assert ended[failing] == status and ended[1 - failing] == 1
    said = log.read_text()
    last = f"process {1 - failing} lost the others; the one that failed says why, if it was not killed"
    assert said.count(last) == 1
    if how == "killed":
        assert "Traceback" not in said
    elif how == "mistake":
        assert "Traceback" not in said and said.count("pictures/7.png has vanished") == 1
        assert "The last checkpoint is" in said and said.index("has vanished") < said.index(last)
    else:
        assert said.count("Traceback") == said.count("ZeroDivisionError: division by zero") == 1
        assert said.index("ZeroDivisionError") < said.index(last)
    assert Run(tmp_path / "run-of-two").step == 2
    assert endings(2, main, argv, seconds=100) == [0, 0]
    assert Run(tmp_path / "run-of-two").step == 4
