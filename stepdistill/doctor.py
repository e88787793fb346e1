"""What `stepdistill doctor` looks at: versions, machine, embedded teachers, and the faults that are known to happen."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from . import surroundings as around
from .show import tell
from .sources import TINY, embedded_models
from .surroundings import Finding, first_line

PURPOSES = {  # optional packages, whatever the extras that bring them
    "tensorboard": "curves in a browser",
    "wandb": "curves at Weights & Biases",
    "pyarrow": "Parquet and Arrow files",
    "open_clip_torch": "CLIP scores, HPSv2",
    "torch-fidelity": "features of Inception",
    "lpips": "perceptual losses and distances",
    "image-reward": "the figure ImageReward",
    "torchao": "a base in 8 bits",
    "bitsandbytes": "a base in 4 bits, an optimizer in 8",
    "xformers": "other kernels of attention",
    "triton": "fused kernels on a GPU",
}
FOR_DEVELOPERS = ("test", "notebooks")  # extras that nobody misses


def examine() -> int:
    """Print what was found, then faults again with their remedies; 1 if there is a fault, else 0."""
    findings = []
    for finding in look():
        tell(written(finding))
        findings.append(finding)
    faults = [finding for finding in findings if finding.level == "fault"]
    if not faults:
        tell("all in order: stepdistill train quickstart")
        return 0
    tell(f"\n{len(faults)} to mend:")
    tell("\n".join(written(finding) for finding in faults))
    return 1


def look() -> Iterator[Finding]:
    """Everything, what others rest on first."""
    checks = (
        *(packages, around.device, around.numbers, around.compiler, around.kernels, around.processes, around.memory),
        *(around.disks, around.shared_memory, around.open_files, around.runs_folder, around.clock, around.hub),
        *(torchvision, pipelines, teachers),
    )
    for check in checks:
        try:
            found = check()
            yield from [found] if isinstance(found, Finding) else found
        except Exception as error:  # of an installation that is broken in a way that nobody thought of
            name = check.__name__.replace("_", " ")
            yield Finding("fault", name, f"cannot be looked at ({first_line(error)}); install stepdistill again")


def written(finding: Finding) -> str:
    """A line."""
    return f"{finding.level:<6}{finding.subject:<22}{finding.said}"


def packages(
    asked: Sequence[str] | None = None, version: Callable[[str], str] = version, python: tuple[int, ...] = sys.version_info[:3]
) -> Iterator[Finding]:
    """Python and the packages, with their versions. asked: requirements; None: those of the installed stepdistill."""
    from packaging.requirements import Requirement

    number = ".".join(map(str, python))
    yield Finding("ok" if python >= (3, 11) else "fault", "python", f"{number} (3.11 or newer is needed)")
    try:
        asked = requires("stepdistill") or () if asked is None else asked
    except PackageNotFoundError:
        yield Finding("fault", "stepdistill", "is not installed, only found: pip install stepdistill, or pip install -e .")
        return
    told = set()
    for wanted in map(Requirement, asked):
        (extra,) = re.findall(r"extra == ['\"]([^'\"]+)", str(wanted.marker)) or [""]
        here = wanted.marker is None or wanted.marker.evaluate({"extra": extra})  # triton is for Linux alone
        if not here or extra in FOR_DEVELOPERS or wanted.name in told:
            continue
        told.add(wanted.name)
        if extra:
            purpose = PURPOSES.get(wanted.name, extra)
            yield package(wanted, version, f"pip install 'stepdistill[{extra}]'", purpose)
        else:
            yield package(wanted, version, f"pip install '{wanted.name}{wanted.specifier}'", "")


def package(wanted: Any, version: Callable[[str], str], remedy: str, purpose: str) -> Finding:
    """Of one package. wanted: its requirement. purpose: what an optional one is for."""
    try:
        found = version(wanted.name)
    except PackageNotFoundError:
        if purpose:
            return Finding("note", wanted.name, f"not installed, optional; {purpose}: {remedy}")
        return Finding("fault", wanted.name, f"missing; {remedy}")
    if not wanted.specifier.contains(found, prereleases=True):
        return Finding("note" if purpose else "fault", wanted.name, f"{found}, but {wanted.specifier} is needed; {remedy}")
    return Finding("ok", wanted.name, found)


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
