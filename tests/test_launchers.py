"""What users type: `accelerate launch` and `torchrun`, with fresh interpreters."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from several import STRATEGIES, prepare

from stepdistill.recipe import load_recipe
from stepdistill.runs import Run, train

pytestmark = pytest.mark.long

QUIET = ("train.steps=3", "train.batch=4", "train.save_every=1", "train.trackers=[]", "eval.every=0", "eval.n=0")
LAUNCHERS = {  # whatever port is free, so that tests may run side by side
    "torchrun": ("torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--nproc_per_node", "2"),
    "accelerate": ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"),
    "accelerate on CPUs": ("accelerate.commands.launch", "--cpu", "--num_processes", "2"),
}


def launch(launcher: tuple[str, ...], recipe: Path, output: Path, *overrides: str) -> tuple[int, str]:
    """Exit status, and what was said."""
    verb = ["-m", "stepdistill", "train", str(recipe), *QUIET, *overrides, "--output", str(output)]
    module = ["-m", *launcher] if launcher else []
    world = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    environment = {name: value for name, value in os.environ.items() if name not in world}
    paths = [str(Path(__file__).parent.parent), str(recipe.parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, *module, *verb],
        env=environment | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_a_launched_run_is_that_of_one_process(tmp_path, launcher):
    recipe = prepare(tmp_path, "lcm")
    train(load_recipe(recipe, QUIET), tmp_path / "one")
    status, said = launch(LAUNCHERS[launcher], recipe, tmp_path / "two")
    assert status == 0, said
    assert said.count("3/3") == said.count("exported to") == said.count("report: ") == 1, said
    assert said.count("prompts encoded: 12/12") == 1 and "Traceback" not in said
    one, two = (load_file(tmp_path / who / "export" / "pytorch_lora_weights.safetensors") for who in ("one", "two"))
    assert one.keys() == two.keys()
    assert max(x.abs().max() for name, x in one.items() if "lora_B" in name) > 1e-3  # of 0 at first
    assert max((x - two[name]).abs().max() for name, x in one.items()) < 1e-5


def test_a_launcher_that_starts_one_process_for_two_is_not_believed(tmp_path):
    status, said = launch(LAUNCHERS["accelerate on CPUs"], prepare(tmp_path, "lcm"), tmp_path / "out")
    assert status != 0 and said.count("asked for several processes and started one") == 1
    assert not (tmp_path / "out").exists()


FAILING = """
import os, signal
from dataclasses import dataclass
from stepdistill.errors import UserError
from stepdistill.strategies import LCM

@dataclass
class Failing(LCM):
    def losses(self, roles, batch, draw):
        if draw.step == 2 and os.environ["RANK"] == "1" and "HOW" in os.environ:
            HOW
        yield from super().losses(roles, batch, draw)
"""
HOW = {
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "mistake": "raise UserError('pictures/7.png has vanished')",
    "bug": "1 / 0",
}


@pytest.mark.parametrize(("launcher", "how"), [*(("torchrun", how) for how in HOW), ("accelerate", "killed")])
def test_one_that_dies_ends_a_launched_run_within_a_minute(tmp_path, monkeypatch, launcher, how):
    recipe = prepare(tmp_path, "lcm")
    (tmp_path / "run" / "failing.py").write_text(FAILING.replace("            HOW", f"            {HOW[how]}"))
    other = STRATEGIES["lcm"].replace("name: lcm", "name: 'failing:Failing'")
    overrides = (f"strategy={other}", "trust_remote_code=true")
    monkeypatch.setenv("HOW", how)
    began = time.monotonic()
    status, said = launch(LAUNCHERS[launcher], recipe, tmp_path / "out", *overrides)
    assert status != 0 and time.monotonic() - began < 60
    mine = said.split("torch/distributed/elastic", 1)[0]  # before the launcher's own words
    word = {"killed": "3/3", "mistake": "pictures/7.png has vanished", "bug": "ZeroDivisionError: division by zero"}[how]
    assert mine.count(word) == (how != "killed")
    assert mine.count("Traceback") == (how == "bug")
    assert Run(tmp_path / "out").step == 2
    if how == "killed":
        monkeypatch.delenv("HOW")
        status, said = launch(LAUNCHERS[launcher], recipe, tmp_path / "out", *overrides)
        assert status == 0 and "going on from" in said and Run(tmp_path / "out").step == 3, said
