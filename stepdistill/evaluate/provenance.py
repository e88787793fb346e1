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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..assemble import Distillation
from ..errors import UserError
from ..files import write_text
from ..foreign import read_json

FORMAT = 1  # of result files
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


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(field, its value in one, in the other) of all that decides figures and differs in two provenances."""
    left, right = dict(_leaves(one.get("compared", {}))), dict(_leaves(other.get("compared", {})))
    names = dict.fromkeys((*left, *right))
    return [(name, left.get(name), right.get(name)) for name in names if left.get(name) != right.get(name)]


def compare(one: Mapping[str, Any], other: Mapping[str, Any], names: tuple[str, str] = ("one", "the other")) -> None:
    """Raises UserError, with each field that differs and both its values, where figures of two provenances do not compare."""
    if found := differences(one, other):
        fields = "; ".join(f"{name} is {a} and {b}" for name, a, b in found)
        raise UserError(f"figures of {names[0]} and {names[1]} do not compare: {fields}. Measure both alike: stepdistill eval")


def read(path: Path) -> dict[str, Any]:
    """A result file: {"format", "rows", "provenance"}.

    Raises:
        UserError: it is none, or of another version.
    """
    try:
        result = read_json(path)
        right = result["format"] == FORMAT and isinstance(result["rows"], list) and "compared" in result["provenance"]
    except (OSError, ValueError, KeyError, TypeError):
        right = False
    if not right:
        raise UserError(f"{path} holds no figures that this version reads; measure them again: stepdistill eval RUN")
    return result


def write(path: Path, rows: list[dict[str, Any]], provenance: Mapping[str, Any]) -> None:
    """Write a result file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"format": FORMAT, "rows": rows, "provenance": provenance}, indent=1))


def _leaves(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """(name in dots, value) of all that is no mapping."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{above}{name}.")
        else:
            yield above + name, list(value) if isinstance(value, tuple) else value


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
