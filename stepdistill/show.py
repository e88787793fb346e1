"""What a run shows while it works: one live line, and log.jsonl."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from .errors import printable
from .files import write_text

SCORE = "watch/score"  # in a line of the log: of the student after that step, lower is better
MOMENT = 1.0  # seconds


def process() -> int:
    """The number of this process among those that a launcher started; asked of the environment, before they know each other."""
    return int(os.environ.get("RANK", 0))


def complain(text: str) -> None:
    """Print an error, once where all processes would say the same.

    Before they know each other, the first one of each machine speaks. Afterwards all do, but they leave the first one a moment:
    what it says as well, its launcher lets nobody repeat.
    """
    if process() > 0:
        group = sys.modules.get("torch.distributed")
        if group is None or not group.is_initialized():
            if int(os.environ.get("LOCAL_RANK", 0)) > 0:
                return
        else:
            time.sleep(MOMENT)
        text = f"process {process()} of {os.environ.get('WORLD_SIZE')}: {text}"
    print(printable(text), file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """3725 -> "1:02:05"."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def tell(text: object, end: str = "\n") -> None:
    """Print what a person asked for."""
    print(printable(str(text)), end=end)


class Line:
    """A line of the terminal that is written over; elsewhere (a file, a pipe) a new line every `every` seconds. Of several
    processes, the first one's alone is shown."""

    def __init__(self, stream: TextIO | None = None, every: float = 15.0):
        self.stream, self.every = stream or (sys.stderr if process() == 0 else None) or nowhere(), every
        self.live, self.last, self.open = self.stream.isatty(), -every, False
        self.began: dict[str, tuple[float, int]] = {}  # job -> when it was first reported, and how much was done

    def __call__(self, text: str, final: bool = False) -> None:
        """Show text; final keeps it and ends the line."""
        now, text = time.monotonic(), printable(text)
        if self.live and (final or now - self.last > 0.2):
            self.write(f"\r\033[K{text}" + ("\n" if final else ""))
        elif final or now - self.last > self.every:
            self.write(text + "\n")
        else:
            return
        self.last, self.open = now, self.live and not final

    def report(self, what: str, done: int, of: int) -> None:
        """Progress of a countable job, and the time that it will take yet."""
        now = time.monotonic()
        began, first = self.began.setdefault(what, (now, done))
        left = f"  {clock((now - began) / (done - first) * (of - done))} left" if first < done < of else ""
        self(f"{what}: {done}/{of}{left}", final=done == of)
        if done == of:
            del self.began[what]

    def say(self, text: str) -> None:
        """A line of its own, below whatever was live."""
        self.write("\n" * self.open + printable(text) + "\n")
        self.open = False

    def write(self, text: str) -> None:
        """Show text; if whoever watched has left, and closed the terminal or pipe, the work goes on without a word."""
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # of a pipe, and of a terminal
                raise
            self.stream = nowhere()


def nowhere() -> TextIO:
    return open(os.devnull, "w")


HELD = 2**20  # bytes of log lines that wait for a disk that is full


class Log:
    """Every step in folder/log.jsonl; steps that a resumed run does again are dropped first."""

    def __init__(self, folder: Path, at: int, line: Line):
        self.path, self.line, self.failed = folder / "log.jsonl", line, False
        old = self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.is_file() else []
        write_text(self.path, "".join(text + "\n" for text in old if _step(text) <= at))
        self.file = self.path.open("ab", buffering=HELD)

    def __call__(self, step: int, seconds: float, values: dict[str, float], rest: Mapping[str, Any] | None = None) -> None:
        """values: of players, as who/what. rest: what else is to be known of this step."""
        self.attempt(json.dumps({"step": step, "seconds": round(seconds, 3), **values, **(rest or {})}).encode() + b"\n")

    def attempt(self, text: bytes) -> None:
        """Write a line. One that a full disk does not take waits, HELD bytes of them at most, for the next, whole as it is."""
        try:
            self.file.write(text)
            self.file.flush()
            self.failed = False
        except OSError as error:
            if not self.failed:
                self.line.say(f"warning: {self.path} cannot be written ({error.strerror or error}); training goes on without")
            self.failed = True

    def close(self) -> None:
        self.attempt(b"")
        with suppress(OSError):  # has been told
            self.file.close()


def _step(line: str) -> float:
    """The step of a log line; a line cut short by a crash counts as the future."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return float("inf")


def read_scores(folder: Path) -> dict[int, float]:
    """The scores of the student in folder/log.jsonl, by step; lines that are damaged are passed over."""
    found = {}
    for text in (folder / "log.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
        if (
            SCORE in text
            and math.isfinite(step := _step(text))
            and isinstance(score := json.loads(text).get(SCORE), int | float)
        ):
            found[int(step)] = score
    return found


def summary(at: int, steps: int, left: float, values: dict[str, float]) -> str:
    """One step in a line: `120/600  0:45 left  student: consistency 0.0123 grad 0.51 lr 1e-03`."""
    players: dict[str, list[str]] = {}
    for name, value in values.items():
        who, what = name.split("/", 1)
        text = f"{value:.0e}" if what == "lr" else f"{value:.3g}"
        players.setdefault(who, []).append(f"{'grad' if what == 'grad_norm' else what} {text}")
    parts = [f"{who}: {' '.join(texts)}" for who, texts in players.items()]
    return "  ".join([f"{at}/{steps}", f"{clock(left)} left", *parts])
