"""How long one picture takes, and how much memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

WARM, CALLS, SECONDS = 2, 10, 1.5  # calls before; calls that count, at most; after so long three are enough
MIB = 2**20


def speed(draw: Callable[[int], Any], device: torch.device) -> dict[str, float]:
    """Milliseconds of draw(k), k = 0, 1, ..: `ms` the median, `ms_low` and `ms_high` the quartiles; and `memory_mib`.

    The device has finished before the clock is read. Memory is the most that was allocated on a GPU meanwhile; on a CPU, the
    most that this process has ever held.
    """
    gpu = device.type == "cuda"
    finish = (lambda: torch.cuda.synchronize(device)) if gpu else (lambda: None)
    for k in range(WARM):
        draw(k)
    finish()
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    spent: list[float] = []
    while len(spent) < CALLS and (len(spent) < 3 or sum(spent) < SECONDS):
        began = time.perf_counter()
        draw(WARM + len(spent))
        finish()
        spent.append(time.perf_counter() - began)
    low, middle, high = (1000 * float(x) for x in np.quantile(spent, [0.25, 0.5, 0.75]))
    memory = torch.cuda.max_memory_allocated(device) if gpu else most_held()
    return {"ms": middle, "ms_low": low, "ms_high": high, "memory_mib": round(memory / MIB, 1)}


def most_held() -> int:
    """The most bytes of memory that this process has ever held."""
    if sys.platform == "win32":  # which has no module resource
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
