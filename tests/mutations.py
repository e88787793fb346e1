"""Breaks the mathematics in the ways that matter, one at a time, and requires the tests against closed forms to notice.

python tests/mutations.py          # all; exit status 1 if a mutation survives, or fits the source no longer
python tests/mutations.py 3 17     # these
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton, as in conftest.py

import importlib
import multiprocessing
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import peft  # noqa: F401 - peft and diffusers so that each fork finds them loaded
import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline  # noqa: F401
from evaluation_mutants import MUTATIONS as OF_EVALUATION
from kernel_mutants import MUTATIONS as OF_KERNELS
from mutants import MUTATIONS as OF_THE_REST
from strategy_mutants import MUTATIONS as OF_STRATEGIES

PROCESSES = 2
REPO = Path(__file__).resolve().parent.parent
MUTATIONS = OF_THE_REST + OF_STRATEGIES + OF_EVALUATION + OF_KERNELS
FOLDERS = {"stepdistill": "stepdistill", "stepdistill_kernels": "kernels", "tests": "tests"}  # as imported: where it is


def oracle(name: str) -> str:
    """The tests that must notice."""
    return next(str(path.relative_to(REPO)) for path in (REPO / "tests").rglob(f"test_{name}.py"))


def survives(file: str, old: str, new: str, tests: str, root: Path) -> str:
    """Why the tests did not notice, or nothing. They run in a fork, on a copy of the packages below root."""
    home = "stepdistill_kernels" if file.startswith("kernels/") else "stepdistill"
    file = file.removeprefix("kernels/")
    source = (REPO / FOLDERS[home] / file).read_text()
    if old not in source:
        return f"{file} no longer says {old!r}: bring the mutation up to date"
    skip = shutil.ignore_patterns("__pycache__", "*.safetensors", "*.npz", "*.png")
    for name, folder in FOLDERS.items():
        shutil.copytree(REPO / folder, root / name, ignore=skip)
    (root / home / file).write_text(source.replace(old, new))
    if (child := os.fork()) == 0:
        os.chdir(root)
        sys.path.insert(0, str(root))
        out = os.open(root / "log", os.O_WRONLY | os.O_CREAT)
        os.dup2(out, 1)
        os.dup2(out, 2)
        status = 9
        try:
            assert importlib.import_module(home).__file__.startswith(str(root))
            for mark in ("not long", "long"):  # the quick ones notice nearly all
                status = int(pytest.main(["-q", "-x", "--tb=no", "-p", "no:cacheprovider", "-m", mark, tests]))
                if status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
                    break
        finally:
            sys.stdout.flush()
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 1:  # tests failed, as they must
        return ""
    last = (root / "log").read_text().strip().splitlines()[-1:]
    return f"{tests} {'passes' if status in (0, 5) else f'could not run ({status})'} with {new!r} for {old!r}: {last}"


def tried(k: int) -> tuple[int, str]:
    """A mutation's number, and why it was not noticed, or nothing."""
    file, old, new, name = MUTATIONS[k]
    with tempfile.TemporaryDirectory() as root:
        return k, survives(file, old, new, oracle(name), Path(root))


def main(chosen: list[int]) -> int:
    torch.set_num_threads(1)
    chosen, began, alive = chosen or list(range(len(MUTATIONS))), time.monotonic(), 0
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("fork")) as pool:
        for done, future in enumerate(as_completed([pool.submit(tried, k) for k in chosen]), 1):
            k, why = future.result()
            alive += bool(why)
            if why:
                print(f"{k}: {MUTATIONS[k][0]}: {why}", flush=True)
            elif done % 20 == 0:
                print(f"{done}/{len(chosen)} mutations, {alive} not noticed, {time.monotonic() - began:.0f} s", flush=True)
    print(f"{len(chosen)} mutations, {alive} not noticed, {time.monotonic() - began:.0f} s")
    return int(alive > 0)


if __name__ == "__main__":
    sys.exit(main([int(k) for k in sys.argv[1:]]))
