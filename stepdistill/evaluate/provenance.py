"""What a figure depends on besides the weights. Figures compare where all that decides them is equal; else they are refused.

A provenance is {"compared": what decides, "told": what is good to know}: of one machine or another, one version of torch or
the next, the same pictures come out but for rounding.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..assemble import Distillation

ROOT = Path(__file__).resolve().parents[2]  # of a checkout
PACKAGES = ("torch", "diffusers", "transformers", "torchmetrics", "numpy")


def digest(value: Any) -> str:
    """16 hexadecimal digits that depend on every part of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def told(distillation: Distillation) -> dict[str, Any]:
    """What figures should not depend on, but for rounding: versions, machine, dtype, model."""
    device, model = distillation.roles.teacher.net.device, distillation.recipe.model
    memory = "most that was allocated on the GPU at once" if device.type == "cuda" else "most that the process has ever held"
    return {
        "stepdistill": __version__,
        **({"commit": commit} if (commit := checkout()) else {}),
        **{name: importlib.metadata.version(name) for name in PACKAGES if _installed(name)},
        "machine": machine(device),
        "model": model.source,
        "revision": model.revision,
        "dtype": model.dtype,
        "ms": "one picture, warm, its prompt encoded beforehand, decoding included: median and quartiles",
        "memory": memory,
    }


def machine(device: torch.device) -> str:
    """Whose speed it is, in a few words."""
    cpu = f"{platform.machine()} cpu, {torch.get_num_threads()} threads"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu


def checkout() -> str | None:
    """The commit that this package is imported from, with a + where files differ from it; None outside of a checkout."""
    if not (ROOT / ".git").exists():
        return None
    try:
        words = ["git", "-C", str(ROOT)]
        head = subprocess.run([*words, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True).stdout
        changed = subprocess.run([*words, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.strip() + "+" * bool(changed.strip())


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
