"""What `stepdistill doctor` looks at: versions, machine, embedded teachers, and the faults that are known to happen."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, NamedTuple

from .sources import TINY, embedded_models

NEEDED = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "torchmetrics", "PyYAML", "pillow")
OPTIONAL = {  # package: what it is for, how to get it
    "tensorboard": "curves in a browser: pip install 'stepdistill[track]'",
    "wandb": "curves at Weights & Biases: pip install 'stepdistill[track]'",
    "pyarrow": "Parquet and Arrow files: pip install 'stepdistill[data]'",
    "open_clip_torch": "CLIP scores: pip install 'stepdistill[eval]'",
    "triton": "fused kernels on a GPU: pip install 'stepdistill[kernels]'",
}


class Finding(NamedTuple):
    level: Literal["ok", "note", "fault"]  # a note is about something optional; a fault keeps runs from working
    subject: str
    said: str


def examine() -> int:
    """Print what was found, faults with their remedies; 1 if there is a fault, else 0."""
    findings = []
    for finding in (*packages(), *machine(), *torchvision(), *pipelines(), *teachers()):
        print(f"{finding.level:<6}{finding.subject:<22}{finding.said}", flush=True)
        findings.append(finding)
    faults = sum(finding.level == "fault" for finding in findings)
    print(f"{faults} to mend" if faults else "all in order: stepdistill train quickstart")
    return 1 if faults else 0


def packages() -> Iterator[Finding]:
    """Python and the packages, with their versions."""
    level = "ok" if sys.version_info >= (3, 11) else "fault"
    yield Finding(level, "python", f"{platform.python_version()} (3.11 or newer is needed)")
    for name in NEEDED:
        try:
            yield Finding("ok", name, version(name))
        except PackageNotFoundError:
            yield Finding("fault", name, f"missing; pip install {name}")
    for name, purpose in OPTIONAL.items():
        try:
            yield Finding("ok", name, version(name))
        except PackageNotFoundError:
            yield Finding("note", name, f"not installed, optional; {purpose}")


def machine() -> Iterator[Finding]:
    """Device, cores, memory, disk."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError) as error:
        yield Finding("fault", "torch", f"does not import ({first_line(error)}); install it again, see https://pytorch.org")
    else:
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            what = f"{torch.cuda.get_device_name()}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
            yield Finding("ok", "device", f"{what}, bf16 {'yes' if torch.cuda.is_bf16_supported() else 'no'}")
        else:
            yield Finding("ok", "device", "CPU (the embedded teachers were made for it; large models want a GPU)")
        yield Finding("ok", "cores", f"{cores}; torch uses {torch.get_num_threads()}")
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        page = os.sysconf("SC_PAGE_SIZE") / 2**30
        free, total = os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page
        yield Finding("ok", "memory", f"{total:.1f} GiB, {free:.1f} unused")
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    level = "ok" if free > 2 else "note"
    yield Finding(level, "disk", f"{free:.1f} GiB free here" + ("" if free > 2 else "; runs may not fit: make room"))


def torchvision() -> Iterator[Finding]:
    """An installed torchvision that does not import breaks every diffusers pipeline."""
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        yield Finding("ok", "torchvision", importlib.import_module("torchvision").__version__)
    except Exception as error:  # whatever it raises, diffusers would meet it
        remedy = "pip uninstall torchvision, or install the build that matches torch (same index, same CUDA or CPU)"
        yield Finding("fault", "torchvision", f"does not import ({first_line(error)}), and breaks diffusers; {remedy}")


def pipelines() -> Iterator[Finding]:
    """Whether diffusers hands out a pipeline class, which imports transformers and much else."""
    try:
        importlib.import_module("diffusers").StableDiffusionPipeline  # noqa: B018 - the attribute is what imports
        yield Finding("ok", "pipelines", "diffusers imports its pipelines")
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        said = f"diffusers cannot import its pipelines ({first_line(error)}); install diffusers and transformers again"
        yield Finding("fault", "pipelines", said)


def teachers(folder: Path = TINY) -> Iterator[Finding]:
    """The embedded teachers: whether they are there and, where SHA256SUMS lists their files, unchanged."""
    models = embedded_models(folder)
    if not models:
        yield Finding("fault", "teachers", f"none in {folder}; install stepdistill again")
    for name, path in models.items():
        bad = list(damaged(path))
        if bad:
            yield Finding("fault", name, f"damaged: {', '.join(bad)}; install stepdistill again")
        else:
            yield Finding("ok", name, "intact" if (path / "SHA256SUMS").is_file() else "present")


def damaged(folder: Path) -> Iterator[str]:
    """The files that folder/SHA256SUMS lists (lines `hash  path`) and that are missing or differ."""
    sums = folder / "SHA256SUMS"
    for line in sums.read_text(encoding="utf-8").splitlines() if sums.is_file() else ():
        digest, _, name = line.partition("  ")
        file = folder / name.strip()
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            yield name.strip()


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line that it says."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
