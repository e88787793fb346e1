"""What `stepdistill doctor` finds around a run: device, numbers, compiler, memory, disks, limits, hub, processes, clock.

Each check takes what it looks at as arguments that default to this machine, so that tests can show it others.
"""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

GIB = 2**30
WANTED = {"here": 2, "of the hub's cache": 20}  # GiB: a run's checkpoints and export; a large model's weights
CGROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
SYSCONF = getattr(os, "sysconf", None)  # which Windows lacks
SHARED = Path("/dev/shm")
FILES = 1024  # that a process should be allowed to have open
SECONDS = 3.0  # to wait for the hub


class Finding(NamedTuple):
    level: Literal["ok", "note", "fault"]  # a note is about something optional; a fault keeps runs from working
    subject: str
    said: str


def device() -> Iterator[Finding]:
    """Accelerators, the numbers that they compute in, and cores."""
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError) as error:
        yield Finding("fault", "torch", f"does not import ({first_line(error)}); install it again, see https://pytorch.org")
        return
    if torch.cuda.is_available():
        for k in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(k)
            what = f"{torch.cuda.get_device_name(k)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
            yield Finding("ok", f"device {k}", what)
    elif torch.accelerator.is_available():
        yield Finding("ok", "device", torch.accelerator.current_accelerator().type)
    else:
        yield Finding("ok", "device", "CPU (the embedded teachers were made for it; large models want a GPU)")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("ok", "cores", f"{cores}; torch uses {torch.get_num_threads()}")


def numbers(lacks: Callable[[Any, Any], bool] | None = None) -> Finding:
    """The types of numbers that the device of a run convolves and multiplies in."""
    import torch

    if lacks is None:
        from .machine import lacks
    where = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    names = ("float32", "bfloat16", "float16")
    missing = [name for name in names if lacks(where, getattr(torch, name))]
    has = ", ".join(name for name in names if name not in missing)
    if "float32" in missing:
        remedy = "PyTorch was built for another device: install the build for this one, see https://pytorch.org"
        return Finding("fault", "numbers", f"{where.type} does not compute in float32; {remedy}")
    if missing:
        keys = [
            key for name, key in zip(names[1:], ("train.precision=no", "model.dtype=float32"), strict=True) if name in missing
        ]
        return Finding("note", "numbers", f"{has}; not {', '.join(missing)}: recipes that ask for it want {' '.join(keys)}")
    return Finding("ok", "numbers", has)


def compiler(which: Callable[[str], str | None] = shutil.which) -> Finding:
    """What train.compile needs."""
    from .machine import COMPILERS

    found = next(filter(None, map(which, COMPILERS)), None)
    if found:
        return Finding("ok", "compiler", f"{found}, for train.compile")
    return Finding("note", "compiler", "none; train.compile needs a C++ compiler: install g++ (apt install g++)")


def kernels(gpu: bool | None = None, find: Callable[[str], Any] = importlib.import_module) -> Finding:
    """Whether the fused kernels of forward-mode derivatives run here."""
    if gpu is None:
        gpu = find("torch").cuda.is_available()
    if not gpu:
        return Finding("ok", "kernels", "the reference in PyTorch: the fused ones want a GPU")
    try:
        find("triton"), find("stepdistill_kernels")
    except Exception as error:  # whatever an import raises
        remedy = "pip install 'stepdistill[kernels]'; until then derivatives take PyTorch's mathematics, slower"
        return Finding("note", "kernels", f"do not import ({first_line(error)}): {remedy}")
    return Finding("ok", "kernels", "fused, by Triton")


def memory(pages: Callable[[str], int] | None = SYSCONF, limits: tuple[Path, ...] = CGROUPS) -> Iterator[Finding]:
    """Of the computer, or of the container, whichever is less."""
    if pages is None:
        return
    try:
        page = pages("SC_PAGE_SIZE")
        free, total = pages("SC_AVPHYS_PAGES") * page, pages("SC_PHYS_PAGES") * page
    except (ValueError, OSError):
        return
    allowed = [int(text) for file in limits if file.is_file() and (text := file.read_text().strip()).isdecimal()]
    said = f"{total / GIB:.1f} GiB, {free / GIB:.1f} unused"
    if allowed and min(allowed) < total:
        total, said = min(allowed), f"{said}; this container may use {min(allowed) / GIB:.1f}"
    level = "ok" if total >= 4 * GIB else "note"
    yield Finding(
        level, "memory", said + ("" if level == "ok" else "; a run of the embedded teachers wants about 2, larger ones more")
    )


def disks(
    home: Path | None = None, cache: Path | None = None, usage: Callable[[Path], Any] = shutil.disk_usage
) -> Iterator[Finding]:
    """Free room for runs, and for what the hub sends."""
    from huggingface_hub.constants import HF_HUB_CACHE

    places = {"here": home or Path.cwd(), "of the hub's cache": cache or Path(HF_HUB_CACHE)}
    for which, place in places.items():
        there = next(folder for folder in (place, *place.parents) if folder.exists())
        free = usage(there).free / GIB
        where = "here" if which == "here" else f"for the hub's cache, {place}"
        if free > WANTED[which]:
            yield Finding("ok", "disk", f"{free:.1f} GiB free {where}")
        else:
            remedy = "make room, or use --output" if which == "here" else "make room, or set HF_HOME to another disk"
            yield Finding("note", "disk", f"{free:.1f} GiB free {where}; less than {WANTED[which]} may not be enough: {remedy}")


def shared_memory(folder: Path = SHARED, usage: Callable[[Path], Any] = shutil.disk_usage) -> Iterator[Finding]:
    """NCCL's processes of one machine talk through it; containers have 64 MB of it unless they are given more."""
    if not folder.is_dir():
        return
    total = usage(folder).total / GIB
    remedy = "several GPUs want more: docker run --shm-size=8g (or --ipc=host)"
    said = f"{total:.2f} GiB in {folder}" + ("" if total >= 1 else f"; {remedy}")
    yield Finding("ok" if total >= 1 else "note", "shared memory", said)


def open_files(limit: int | None = None) -> Iterator[Finding]:
    """How many a process may have open: checkpoints, tables, trackers and processes each take some."""
    if limit is None:
        try:
            import resource

            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        except (ImportError, ValueError, OSError):
            return
    enough = limit >= FILES or limit < 0  # -1: without limit
    said = f"{'any number' if limit < 0 else limit} may be open"
    yield Finding("ok" if enough else "note", "files", said + ("" if enough else f"; raise it: ulimit -n {4 * FILES}"))


def runs_folder(home: Path | None = None) -> Finding:
    """Whether a run can be written here."""
    home = home or Path.cwd()
    runs = home / "runs"
    try:
        with tempfile.TemporaryFile(dir=runs if runs.is_dir() else home):
            pass
    except OSError as error:
        return Finding("fault", "runs", f"{runs} cannot be written ({first_line(error)}); mend its rights, or give --output")
    return Finding("ok", "runs", f"{runs} can be written")


def hub(
    environment: Mapping[str, str] = os.environ,
    token: Callable[[], str | None] | None = None,
    ask: Callable[[str], None] | None = None,
) -> Iterator[Finding]:
    """Whether models and data can be fetched: the only check that reaches out. A machine without network is none with a fault.

    environment: its HF_HUB_OFFLINE and HF_ENDPOINT. token: that of the hub, which is not shown. ask: raises OSError if an
    address does not answer.
    """
    if token is None:
        from huggingface_hub import get_token as token
    said = "there is one" if token() else "none; private and gated models want one: hf auth login, or the variable HF_TOKEN"
    yield Finding("ok", "hub token", said)
    if environment.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        yield Finding("note", "hub", "not asked: HF_HUB_OFFLINE is set, so that only what is on this disk can be used")
        return
    address = environment.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        (ask or head)(address)
    except OSError as error:  # urllib's own are OSErrors
        remedy = "models and data must be on this disk; behind a proxy set HTTPS_PROXY, for a mirror HF_ENDPOINT"
        yield Finding("note", "hub", f"{address} does not answer ({first_line(error)}): {remedy}")
    else:
        yield Finding("ok", "hub", f"{address} answers (this was the one request that doctor sends)")


def head(address: str) -> None:
    """Ask an address for nothing but whether it is there; a refusal is an answer too. Raises OSError."""
    if not address.startswith(("https://", "http://")):
        raise OSError(f"{address} is no address of a server")
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=SECONDS).close()
    except urllib.error.HTTPError as error:
        error.close()


def processes(gpus: int | None = None, dist: Any = None) -> Finding:
    """How several processes would talk."""
    torch = importlib.import_module("torch")
    dist = dist or torch.distributed
    gpus = torch.cuda.device_count() if gpus is None else gpus
    if not dist.is_available():
        return Finding("note", "processes", "this PyTorch has no torch.distributed: one process only; install another build")
    there = [name for name in ("nccl", "gloo") if getattr(dist, f"is_{name}_available")()]
    if gpus > 1 and "nccl" not in there:
        said = f"{gpus} GPUs, but PyTorch has no NCCL: they cannot work together; install a CUDA or ROCm build"
        return Finding("note", "processes", said)
    return Finding("ok", "processes", f"can talk through {' and '.join(there)}" if there else "one only: no NCCL, no gloo")


def clock(now: float | None = None, made: float | None = None) -> Finding:
    """A clock that is years late breaks secure connections, and dates files wrongly. made: when the package came here."""
    now = time.time() if now is None else now
    made = Path(__file__).stat().st_mtime if made is None else made
    said = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now))
    if now >= made - 86400:
        return Finding("ok", "clock", said)
    return Finding("note", "clock", f"{said}, before stepdistill was installed here; set it: secure connections fail otherwise")


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line that it says."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
