"""What every part measures with: a device's clock, works that take turns, ceilings, and files that say where they come from."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

REPO = Path(__file__).resolve().parents[2]
Work = Callable[[], Any]
NVIDIA = "clocks.sm,clocks.mem,power.draw,temperature.gpu"  # MHz, MHz, W, degrees C


class Gpu:
    """A CUDA device: times between its events, each after its cache was flushed."""

    dry, device = False, torch.device("cuda")
    least, most, seconds = 20, 100, 1.0  # repetitions of a work; as many between as these seconds allow
    matmul, copy = 8192, 2**31  # of the ceilings: side of the matrices, bytes copied

    def __init__(self):
        if not torch.cuda.is_available():
            sys.exit("no CUDA device here; --dry shows the path without one")
        os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp(prefix="triton-"))  # first calls compile
        self.name = torch.cuda.get_device_name()
        self.trash = torch.empty(2**28, dtype=torch.int8, device=self.device)  # several times any L2 cache
        self.flush_ms = math.inf
        self.flush_ms = take_turns(self, {"flush": self.trash.zero_})["flush"]["ms"]

    def sync(self) -> None:
        torch.cuda.synchronize()

    def ready(self, host_ms: float) -> None:
        """Flush the cache, for longer than the host needs to launch a work, which then never waits for the host."""
        for _ in range(1 + math.ceil(1.5 * host_ms / self.flush_ms)):
            self.trash.zero_()

    def stamp(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, a: torch.cuda.Event, b: torch.cuda.Event) -> float:
        """Milliseconds."""
        return a.elapsed_time(b)

    def peak_mb(self, work: Work) -> float:
        """What a call needs besides what is there already, its results included."""
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        self.sync()
        return (torch.cuda.max_memory_allocated() - before) / 1e6

    def free(self) -> int:
        """Bytes that could be had."""
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def alive(self) -> bool:
        """Whether it still computes: some errors of a kernel end a process's use of the device."""
        try:
            self.sync()
            return bool(torch.ones(1, device=self.device).item())
        except RuntimeError:
            return False

    def state(self) -> dict[str, float]:
        """Clocks and power now; empty where nvidia-smi does not tell."""
        told = _nvidia(NVIDIA)
        with contextlib.suppress(ValueError):
            return dict(zip(NVIDIA.split(","), map(float, told), strict=True))
        return {}

    def driver(self) -> str | None:
        return next(iter(_nvidia("driver_version")), None)


class Host:
    """The CPU, for a dry run: the host's clock and hardly a repetition."""

    dry, name, device = True, "CPU", torch.device("cpu")
    least, most, seconds = 2, 4, 0.002
    matmul, copy = 32, 2**12

    def sync(self) -> None:
        pass

    def ready(self, host_ms: float) -> None:
        pass

    def stamp(self) -> float:
        return time.perf_counter()

    def between(self, a: float, b: float) -> float:
        return (b - a) * 1e3

    def peak_mb(self, work: Work) -> None:
        work()

    def free(self) -> int:
        return 2**40

    def alive(self) -> bool:
        return True

    def state(self) -> dict[str, float]:
        return {}

    def driver(self) -> None:
        pass


def take_turns(on: Gpu | Host, works: dict[str, Work]) -> dict[str, dict[str, float]]:
    """Time works side by side, so that clocks and heat are the same for all; none is here for the first time.

    Returns:
        For each: ms, the median, p10 and p90 of reps repetitions; host_ms, what the host spends on launching one.
    """
    host, count = {}, {}
    for name, work in works.items():
        launch, whole = zip(*(_call(on, work) for _ in range(3)), strict=True)
        host[name] = min(launch)
        count[name] = min(on.most, max(on.least, int(on.seconds * 1e3 / min(whole))))
    rounds, stamps = max(count.values()), {name: [] for name in works}
    for k in range(rounds):
        for name, work in works.items():
            if (k + 1) * count[name] // rounds > k * count[name] // rounds:  # slower works evenly among the quick ones
                on.ready(host[name])
                before = on.stamp()
                work()
                stamps[name].append((before, on.stamp()))
    on.sync()
    found = {}
    for name, pairs in stamps.items():
        tenths = statistics.quantiles((on.between(*pair) for pair in pairs), n=10, method="inclusive")
        found[name] = {"ms": tenths[4], "p10": tenths[0], "p90": tenths[8], "reps": len(pairs), "host_ms": host[name]}
    return found


def _call(on: Gpu | Host, work: Work) -> tuple[float, float]:
    """Milliseconds by the host's clock until a call returns, and until the device is done."""
    on.sync()
    start = time.perf_counter()
    work()
    launched = time.perf_counter()
    on.sync()
    return (launched - start) * 1e3, (time.perf_counter() - start) * 1e3


def first_ms(on: Gpu | Host, work: Work) -> float:
    """Of a work's first call: with whatever it compiles and loads."""
    return _call(on, work)[1]


def matmul_tflops(on: Gpu | Host) -> float:
    """The ceiling of dense bfloat16 products, on random numbers: zeros would run faster."""
    n = on.matmul
    a, b = (torch.randn(n, n, device=on.device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / take_turns(on, {"matmul": lambda: torch.mm(a, b, out=out)})["matmul"]["ms"] / 1e9


def copy_gb_s(on: Gpu | Host) -> float:
    """The ceiling of the device's memory: bytes read and bytes written."""
    source = torch.empty(on.copy, dtype=torch.int8, device=on.device).random_()
    target = torch.empty_like(source)
    return 2 * on.copy / take_turns(on, {"copy": lambda: target.copy_(source)})["copy"]["ms"] / 1e6


def begin(on: Gpu | Host, path: Path, part: str, commit: str | None) -> dict[str, Any]:
    """Results to go on with: what the file holds if the same code made it on the same device, otherwise none; and this run."""
    same = {
        "part": part,
        "dry": on.dry,
        "device": on.name,
        "source": digest(REPO / "kernels", REPO / "benchmarks" / "gpu"),
        "torch": torch.__version__,
        "triton": version("triton"),
    }
    held = read(path) if path.is_file() else {}
    results = held if same.items() <= held.items() else {**same, "runs": [], "rows": {}}
    run = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit or _commit(),
        "driver": on.driver(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "before": on.state(),
    }
    results["runs"].append(run)
    print(f"{on.name}, torch {same['torch']}, triton {same['triton']}, commit {run['commit']}, source {same['source']}")
    if results["rows"]:
        print(f"{len(results['rows'])} rows are there already")
    return results


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def save(results: dict[str, Any], path: Path) -> None:
    """In one move: an interrupted write leaves the file as it was."""
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    draft.replace(path)


def digest(*folders: Path) -> str:
    """Of the Python files in these folders: which code was measured, whether or not it was committed."""
    files = sorted(path for folder in folders for path in folder.glob("*.py"))
    made = hashlib.sha256()
    for path in files:
        made.update(path.relative_to(REPO).as_posix().encode() + b"\0" + path.read_bytes())
    return made.hexdigest()[:12]


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def told(error: Exception) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def kernels() -> ModuleType:
    """stepdistill_kernels of this checkout, whose code `digest` names: the folder kernels/, installed or not."""
    name, folder = "stepdistill_kernels", REPO / "kernels"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def _commit() -> str | None:
    """The checkout's, with a + if it was edited since; None without git."""
    try:
        told = [
            subprocess.run(["git", *words], cwd=REPO, capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "kernels", "benchmarks/gpu/*.py"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return told[0] + "+" * bool(told[1])


def _nvidia(query: str) -> list[str]:
    """What nvidia-smi tells of the first device."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [word.strip() for word in told.partition("\n")[0].split(",") if word.strip()]
