"""What a run took, over all the times that it was started: the file summary.json in its folder, and a table at the end."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from . import distributed
from .errors import Diverged
from .files import write_text
from .foreign import read_json
from .show import Line, clock
from .timing import OTHER, Times

FILE = "summary.json"
HOW = {"finished": "finished", "stopped": "stopped", "diverged": "diverged", "failed": "failed", "running": "killed"}


class Account:
    """The seconds of one start of a run, by name, and of the earlier ones. Its file is written with each checkpoint, so that
    a kill costs no more than the time that has to be spent again.

    at, of: the step that it starts from, and the last one of the recipe. batch: samples a step.
    """

    def __init__(self, folder: Path, times: Times, at: int, of: int, batch: int):
        self.file, self.times = folder / FILE, times
        self.first, self.at, self.of, self.batch = at, at, of, batch
        self.before, self.spent = read(self.file), {}

    def told(self, at: int) -> dict[str, Any]:
        """What the log holds of a step beside its values: seconds by name since the last call, and a GPU's peak memory."""
        self.at, found = at, self.times.take()
        self.spent = add(self.spent, found)
        return {"spent": {name: round(seconds, 6) for name, seconds in found.items()}} | peak()

    def summary(self, ended: str) -> dict[str, Any]:
        """What the file holds. ended: a key of HOW."""
        now = part(self.at - self.first, self.spent)
        every = part(self.before.get("steps", 0) + now["steps"], add(self.before.get("spent", {}), self.spent))
        at = {"ended": ended, "step": self.at, "of": self.of, "batch": self.batch}
        return at | {"starts": self.before.get("starts", 0) + 1} | every | {"last": now} | peak()

    def write(self, ended: str = "running") -> dict[str, Any]:
        """Write the file, beside and renamed; returns what it holds."""
        made = self.summary(ended)
        if distributed.rank() == 0:
            write_text(self.file, json.dumps(made, indent=1) + "\n")
        return made


@contextmanager
def accounted(account: Account, line: Line) -> Iterator[None]:
    """Whatever ends what is done in here, the file is written, and a table shown."""
    ended = "failed"
    try:
        yield
        ended = "finished"
    except KeyboardInterrupt:
        ended = "stopped"
        raise
    except Diverged:
        ended = "diverged"
        raise
    finally:
        with suppress(RuntimeError):  # of a device that failed: the error that ends the run is on its way already
            account.told(account.at)
        try:
            made = account.write(ended)
        except OSError as error:  # a full disk, say, which may well be what ended the run
            made = account.summary(ended)
            line.say(f"{account.file} could not be written ({error})")
        line.say(table(made))


def read(file: Path) -> dict[str, Any]:
    """What earlier starts wrote; nothing of a file that is missing or damaged."""
    try:
        made = read_json(file)
        spent = {name: float(seconds) for name, seconds in made["spent"].items()}
        if not all(name.isidentifier() and 0 <= seconds < float("inf") for name, seconds in spent.items()):
            return {}
        return made | {"steps": int(made["steps"]), "starts": int(made["starts"]), "spent": spent}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def peak() -> dict[str, float]:
    """The most memory that this process has held on its accelerator, if it has one that counts it."""
    if not torch.accelerator.is_available() or torch.accelerator.current_accelerator().type == "mps":
        return {}
    return {"peak_mib": round(torch.accelerator.max_memory_allocated() / 2**20, 1)}


def part(steps: int, spent: Mapping[str, float]) -> dict[str, Any]:
    """Steps, and the seconds that they took, the longest first."""
    ordered = sorted(spent.items(), key=lambda item: (item[0] == OTHER, -item[1]))
    return {
        "steps": steps,
        "seconds": round(sum(spent.values()), 3),
        "spent": {name: round(seconds, 3) for name, seconds in ordered},
    }


def add(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    """Seconds by name of both."""
    return {name: one.get(name, 0.0) + other.get(name, 0.0) for name in [*one, *(name for name in other if name not in one)]}


def table(made: Mapping[str, Any]) -> str:
    """A summary in lines: how it ended, and where the time went, of the last start and of all of them."""
    last, steps = made["last"], made["last"]["steps"]
    walked = "1 step" if steps == 1 else f"{steps} steps"
    head = f"{HOW[made['ended']]} at step {made['step']} of {made['of']}: {walked} in {clock(last['seconds'])}"
    training = last["seconds"] - sum(last["spent"].get(name, 0.0) for name in ("preparing", "evaluation", "saving"))
    if steps and training > 0:
        head += f", {training / steps:.3g} s a step, {steps * made['batch'] / training:.3g} samples/s"
    parts = [last] if made["starts"] == 1 else [last, made]
    names = [name for name in made["spent"] if any(row["spent"].get(name, 0.0) >= 0.001 * row["seconds"] for row in parts)]
    heads = ["this time", f"of all {made['starts']} starts"][: len(parts)]
    if "peak_mib" in made:
        head += f", at most {made['peak_mib'] / 1024:.2f} GiB of the accelerator's memory"
    lines = [head] + ([" " * 14 + "".join(f"{text:>20}" for text in heads)] if len(parts) > 1 else [])
    for name in names:
        cells = "".join(cell(row["spent"].get(name, 0.0), row["seconds"]) for row in parts)
        lines.append(f"  {name:<12}{cells}")
    return "\n".join(lines)


def cell(seconds: float, of: float) -> str:
    """A time, and its share."""
    return f"{clock(seconds):>12}{seconds / of if of else 0:>8.1%}"
