"""Trainings in processes of their own that are killed, and go on: the same command, again and again."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from processes import start
from safetensors.torch import load_file

from stepdistill import checkpoint, files

SAVING = (checkpoint.__file__, files.__file__)


def command(file: Path, output: Path, *overrides: str) -> list[str]:
    return ["train", str(file), *overrides, "--output", str(output)]


def die_within(moment: int, sources: tuple[str, ...]) -> None:
    """Let this process be killed before it executes so many more lines of these files."""
    left = moment

    def trace(frame, event, _):
        nonlocal left
        if frame.f_code.co_filename not in sources:
            return None
        if event == "line":
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)


def training(argv: list[str], moment: int | None) -> int:
    """The command line; killed before it executes so many lines of what writes checkpoints and other files."""
    torch.set_num_threads(1)
    if moment is not None:
        die_within(moment, SAVING)
    from stepdistill.cli import main

    return main(argv)


def run_whole(argv: list[str]) -> float:
    """Train to the end; returns the seconds it took."""
    began = time.monotonic()
    process = start(training, argv, None)
    process.join()
    assert process.exitcode == 0, process.exitcode
    return time.monotonic() - began


def killed(argv: list[str], rng: random.Random, seconds: float, lines: int, inside: bool) -> bool:
    """Train, and be killed at a random moment: after some of those seconds, or inside saving; whether it came to that."""
    process = start(training, argv, rng.randrange(lines) if inside else None)
    if inside:
        process.join()
    else:
        process.join(rng.uniform(0, seconds))
        process.kill()
        process.join()
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return process.exitcode != 0


def result(output: Path) -> dict[str, torch.Tensor]:
    """Everything that a finished run ends with: its newest checkpoint, and its exported files."""
    tensors = dict(checkpoint.load(checkpoint.newest(output / "checkpoints"))[0])
    exported = sorted((output / "export").rglob("*.safetensors"))
    assert exported
    return tensors | {f"{file.name}/{name}": x for file in exported for name, x in load_file(file).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(x, other[name]) for name, x in one.items())
