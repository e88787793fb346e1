"""A training that is killed at any moment, and started again, ends with the weights of one left alone, bit for bit."""

from __future__ import annotations

import json
import random
import shutil

import pytest
from killing import command, killed, result, run_whole, same
from students import student

QUICK = (
    *("data.count=8", "train.batch=4", "train.steps=6", "train.save_every=1", "eval.every=2", "eval.n=0", "eval.steps=[2]"),
    *("optim.student_lr=1e-2", "optim.critic_lr=1e-2", "optim.schedule=cosine", "optim.warmup=2"),
)
CASES = {  # name -> strategy, overrides
    "lcm": ("{name: lcm, guidance: [1, 3], ema: 0.9}", ["train.ema=0.9"]),
    "dmd2": ("{name: dmd2, student_every: 2, guidance: 2, gan: 0.1}", ["data.images=stepdistill/tiny"]),
    "f_distill": ("{name: f_distill, student_every: 2, bins: 2, bins_decay: 0.5}", ["lora=null"]),
    "phased_dmd": ("{name: phased_dmd, steps: 2, phase_steps: 3, student_every: 1, guidance: 2}", ["train.ema=0.9"]),
    "tscd": ("{name: tscd, segments: [2, 1], stage_steps: 3, mix: [0.1, 0.2], grid: 4, guidance: [1, 3], ema: 0.9}", []),
}


def repeat(folder, case, kills, seed, timed=True):
    """Kill runs of a case so often, and compare each that comes to its end; timed: each second time not inside saving."""
    strategy, overrides = CASES[case]
    student(folder, "eps", "train.steps=6", *overrides, strategy=strategy)
    file, rng = folder / "run" / "recipe.yaml", random.Random(seed)
    argv = lambda name: command(file, folder / name, *QUICK, *overrides)  # noqa: E731
    run_whole(argv("whole"))
    seconds = run_whole(argv("again")) if timed else 0.0  # the first one may wait for the server of processes
    wanted, done, ends = result(folder / "whole"), 0, 0
    while done < kills:
        went_on = killed(argv("killed"), rng, seconds, 2500, inside=done % 2 == 0 or not timed)
        done += went_on
        if not went_on or done == kills:
            run_whole(argv("killed"))  # says that it is finished, or finishes
            ends += 1
            assert same(wanted, result(folder / "killed")), f"seed {seed}, after {done} kills"
            steps = [json.loads(line)["step"] for line in (folder / "killed" / "log.jsonl").read_text().splitlines()]
            assert steps == list(range(1, 7))
            grids = sorted(path.name for path in (folder / "killed" / "samples").glob("*.png"))
            assert grids[1:] == [f"00000{k}.png" for k in (2, 4, 6)] or grids == [f"00000{k}.png" for k in (0, 2, 4, 6)]
            left = [str(path) for path in (folder / "killed" / "checkpoints").iterdir() if not path.name.isdecimal()]
            assert left == []
            shutil.rmtree(folder / "killed")
    print(f"{case}: {done} kills, {ends} ends, {seconds:.1f} s a run")


def test_a_killed_run_ends_as_one_left_alone(tmp_path):
    repeat(tmp_path, "lcm", 2, 0, timed=False)


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_runs_killed_at_fifty_moments_end_as_ones_left_alone(tmp_path, case):
    repeat(tmp_path, case, 10, list(CASES).index(case) + 1)
