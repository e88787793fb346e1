"""Trains for minutes in one process, and watches what the process holds: memory, open files, threads.

    python benchmarks/soak.py               # 20 minutes; writes benchmarks/soak.json
    python benchmarks/soak.py --minutes 3

Each round goes on with one run: it loads the teacher and the newest checkpoint, trains, saves, draws grids, exports, evaluates
and writes the report, as `stepdistill train` does. What is held is looked at every half second. Memory that leaks grows from
round to round: the slope is that of a line through the rounds' means, for neighbouring samples are much alike; its interval is
Student's. The first rounds do not count: they import, compile and fill caches.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).with_suffix(".json")
MIB = 2**20
WARM = 2  # rounds that do not count
NOISE = 1.0  # MiB an hour that nobody would notice
OVERRIDES = (
    *("data.count=64", "train.batch=4", "train.ema=0.9", "optim.warmup=0", "optim.schedule=constant"),
    *("train.save_every=15", "train.keep=2", "eval.every=20", "eval.n=80"),
)
STEPS = 60  # of a round
# two-sided 95 % of Student's distribution, by degrees of freedom; beyond the last one it is nearly normal
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120)


def held() -> dict[str, int]:
    """Bytes of memory, open files and threads of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    files = len(os.listdir("/proc/self/fd")) - 1  # but for the folder itself
    return {"rss": pages * os.sysconf("SC_PAGE_SIZE"), "files": files, "threads": len(os.listdir("/proc/self/task"))}


class Watcher(threading.Thread):
    """Looks every so many seconds at what is held, until it is told to stop."""

    def __init__(self, every: float = 0.5):
        super().__init__(daemon=True)
        self.every, self.began, self.round = every, time.monotonic(), 0
        self.stopped = threading.Event()
        self.seen: list[tuple[int, float, int]] = []  # round, seconds, bytes

    def run(self) -> None:
        while not self.stopped.wait(self.every):
            self.seen.append((self.round, time.monotonic() - self.began, held()["rss"]))


def slope(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """The slope of y over x by least squares, and its 95 % interval; the points are independent. At least three."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    x = x - x.mean()
    b = (x * y).sum() / (x * x).sum()
    left = y - y.mean() - b * x
    error = np.sqrt((left**2).sum() / (len(x) - 2) / (x * x).sum())
    t = STUDENT[len(x) - 3] if len(x) - 3 < len(STUDENT) else 2.1
    return float(b), float(b - t * error), float(b + t * error)


def judge(seen: Sequence[tuple[int, float, int]], ends: Sequence[dict[str, int]], warm: int = WARM) -> dict[str, Any]:
    """Figures and verdict. seen: as a Watcher's. ends: what was held at the end of each round."""
    rounds = sorted({k for k, _, _ in seen if warm <= k < len(ends)})
    at = [float(np.mean([t for k, t, _ in seen if k == r])) / 3600 for r in rounds]
    rss = [float(np.mean([x for k, _, x in seen if k == r])) / MIB for r in rounds]
    per_hour, low, high = slope(at, rss)
    files, threads = ([end[key] for end in ends[warm:]] for key in ("files", "threads"))
    return {
        "rounds": len(rounds),
        "mib_per_hour": per_hour,
        "low": low,
        "high": high,
        "mib": rss,
        "files": files,
        "threads": threads,
        "flat": low <= 0 or per_hour < NOISE,
        "constant": len(set(files)) == 1 and max(threads) <= max(threads[:1]),
    }


def soak(minutes: float, folder: Path, leak: int = 0, warm: int = WARM) -> dict[str, Any]:
    """Train in rounds until the minutes are over, and at least three that count; what `judge` says of them.

    leak: bytes that each step is made to lose, to see whether it is noticed.
    """
    from stepdistill import load_recipe, runs
    from stepdistill.trainer import Trainer

    lost: list[bytearray] = []
    honest = Trainer.step

    def leaking(self):
        lost.append(bytearray(os.urandom(64) * (leak // 64)))
        return honest(self)

    watcher, ends, steps = Watcher(), [], 0
    watcher.start()
    if leak:
        Trainer.step = leaking
    try:
        while len(ends) < warm + 3 or time.monotonic() - watcher.began < 60 * minutes:
            steps += STEPS
            runs.train(load_recipe("quickstart", [*OVERRIDES, f"train.steps={steps}"]), folder / "run")
            ends.append(held())
            watcher.round = len(ends)
    finally:
        Trainer.step = honest
        watcher.stopped.set()
        watcher.join()
    taken = time.monotonic() - watcher.began
    return judge(watcher.seen, ends, warm) | {"minutes": taken / 60, "steps": steps, "samples": len(watcher.seen)}


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
    print(
        f"{made['minutes']:.0f} minutes, {made['steps']} steps, {made['rounds']} rounds: "
        f"{made['mib_per_hour']:+.1f} MiB an hour ({made['low']:+.1f} .. {made['high']:+.1f}), open files {set(made['files'])}"
    )
    return 0 if made["flat"] and made["constant"] else 1


if __name__ == "__main__":
    sys.exit(main())
