"""Trains for minutes in one process, and watches what the process holds: memory, open files, threads.

    python benchmarks/soak.py               # 20 minutes; writes benchmarks/soak.json
    python benchmarks/soak.py --minutes 60

It is one `train` of the embedded teacher's student, with its log, trackers, checkpoints and sample grids, which is measured as
well, once a cycle of steps. Memory is looked at after every step, as the system counts it, and as the allocator does, which is
sharper: it does not count what it keeps for later. What leaks grows from cycle to cycle: the slope is that of a line through
the cycles' means, for neighbouring steps are much alike, and its interval is Student's. The first cycles do not count: they
import, and fill caches. In the end the process sends itself SIGTERM, which has to save and leave.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).with_suffix(".json")
MIB = 2**20
STEPS = 200_000  # at most
WARM = 3  # cycles that do not count
NOISE = 1.0  # MiB an hour that nobody would notice
OVERRIDES = (
    *("data.count=64", "train.batch=4", "train.ema=0.9", "train.steps=1000000", "optim.schedule=constant"),
    *("train.save_every=15", "train.keep=2", "eval.every=20", "eval.steps=[2,1]"),
)
# two-sided 95 % of Student's distribution, by degrees of freedom; beyond the last one it is nearly normal
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120)


class Heap(ctypes.Structure):
    """What glibc tells of its allocator, `struct mallinfo2`."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keep"]
    ]


def heap() -> int | None:
    """Bytes that the allocator has given out and not got back, tensors among them; None where it does not tell."""
    ask = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if ask is None:
        return None
    ask.restype = Heap
    told = ask()
    return told.uordblks + told.hblkhd


def held() -> dict[str, int]:
    """Bytes of memory, open files and threads of this process.

    memory: what is no part of a file, in pages, also those that the allocator keeps for later. heap: see there.
    """
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    memory = int(status["RssAnon"].split()[0]) * 1024
    files = len(os.listdir("/proc/self/fd")) - 1  # but for the folder itself
    given = heap()
    return {"memory": memory, "heap": memory if given is None else given, "files": files, "threads": int(status["Threads"])}


def slope(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """The slope of y over x by least squares, and its 95 % interval; the points are independent. At least three."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    x = x - x.mean()
    b = (x * y).sum() / (x * x).sum()
    left = y - y.mean() - b * x
    error = np.sqrt((left**2).sum() / (len(x) - 2) / (x * x).sum())
    t = STUDENT[len(x) - 3] if len(x) - 3 < len(STUDENT) else 2.1
    return float(b), float(b - t * error), float(b + t * error)


def trend(cycles: range, at: Sequence[float], values: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """How what is held grows. at: hours of each cycle. values: cycle and bytes of every step."""
    mib = [float(np.mean([x for k, x in values if k == cycle])) / MIB for cycle in cycles]
    per_hour, low, high = slope(at, mib)
    steps_per_hour = sum(k in cycles[1:] for k, _ in values) / (at[-1] - at[0])
    return {
        "mib_per_hour": per_hour,
        "low": low,
        "high": high,
        "kib_per_step_noticed": (high - per_hour) / steps_per_hour * 1024,  # half of the interval: a greater leak shows
        "mib": [round(x, 2) for x in mib],
        "flat": low <= 0 or per_hour < NOISE,
    }


def judge(seen: Sequence[Sequence[float]], ends: Sequence[dict[str, int]], warm: int = WARM) -> dict[str, Any]:
    """Figures and verdict. seen: cycle, seconds, memory, heap of every step. ends: what was held at the end of each cycle."""
    cycles = range(warm, len(ends))
    at = [float(np.mean([t for k, t, _, _ in seen if k == cycle])) / 3600 for cycle in cycles]
    trends = {
        "memory": trend(cycles, at, [(k, x) for k, _, x, _ in seen]),
        "heap": trend(cycles, at, [(k, x) for k, _, _, x in seen]),
    }
    files, threads = ([end[key] for end in ends[warm:]] for key in ("files", "threads"))
    constant = len(set(files)) == 1 and max(threads) == threads[0]
    flat = all(one["flat"] for one in trends.values())
    return {"cycles": len(cycles), "flat": flat, "constant": constant, **trends, "files": files, "threads": threads}


def soak(minutes: float, folder: Path, leak: int = 0, cycle: int = 40, figures: bool = True) -> dict[str, Any]:
    """Train until the minutes are over, and at least three cycles that count; what `judge` says of them.

    leak: bytes that each step is made to lose, to see whether it is noticed. cycle: steps. figures: measured in each.
    """
    from stepdistill import load_recipe
    from stepdistill.evaluate.evaluation import compare
    from stepdistill.evaluate.presets import tiny_suite
    from stepdistill.runs import train
    from stepdistill.show import Line
    from stepdistill.trainer import Trainer

    began, honest = time.monotonic(), Trainer.step
    lost: list[bytes] = []
    seen = np.full((STEPS, 4), np.nan)  # there from the beginning: what notes the steps must not grow with them
    ends: list[dict[str, int]] = []

    def step(self: Trainer) -> dict[str, float]:
        values = honest(self)
        if leak:
            lost.append(os.urandom(leak))
        now = held()
        seen[self.at - 1] = len(ends), time.monotonic() - began, now["memory"], now["heap"]
        if self.at % cycle == 0:
            if figures:
                compare(self.distillation, tiny_suite(80), folder / "eval", Line(), steps=[1], against=["none"])
            ends.append(held())
            if len(ends) >= WARM + 3 and time.monotonic() - began > 60 * minutes:
                os.kill(os.getpid(), signal.SIGTERM)
        return values

    Trainer.step = step
    try:
        train(load_recipe("quickstart", OVERRIDES), folder / "run")
    except KeyboardInterrupt:
        pass
    finally:
        Trainer.step = honest
    seen = seen[~np.isnan(seen[:, 0])]
    return judge(seen, ends) | {"minutes": (time.monotonic() - began) / 60, "steps": len(seen)}


def commit() -> str:
    """Of the code that ran."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    minutes = parser.parse_args().minutes
    import torch

    with tempfile.TemporaryDirectory() as folder:
        made = soak(minutes, Path(folder))
    made |= {"machine": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__, "commit": commit()}
    RESULTS.write_text(json.dumps(made, indent=1) + "\n")
    print(f"{made['minutes']:.0f} minutes, {made['steps']} steps, {made['cycles']} cycles; open files {set(made['files'])}")
    for what in ("memory", "heap"):
        one = made[what]
        print(f"{what}: {one['mib_per_hour']:+.2f} MiB an hour ({one['low']:+.2f} .. {one['high']:+.2f})")
    return 0 if made["flat"] and made["constant"] else 1


if __name__ == "__main__":
    sys.exit(main())
