"""Named tensors and a small JSON, saved as one folder that is either complete or absent:
checkpoints/000100/state.safetensors and state.json.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor


def save(folder: Path, step: int, tensors: dict[str, Tensor], meta: dict[str, Any], keep: int) -> Path:
    """Write folder/<step>, then remove all but the newest `keep`. It is written beside, synced, and renamed."""
    done, tmp = folder / f"{step:06d}", folder / f".{step:06d}.tmp"
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, tmp / "state.safetensors")
    (tmp / "state.json").write_text(json.dumps({"step": step, **meta}, indent=1))
    for file in (*tmp.iterdir(), tmp):
        sync(file)
    if done.exists():  # the same step again, after resuming at it
        shutil.rmtree(done)
    tmp.rename(done)
    sync(folder)
    for old in steps(folder)[:-keep]:
        shutil.rmtree(folder / f"{old:06d}")
    return done


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the JSON of one checkpoint."""
    return load_file(path / "state.safetensors"), json.loads((path / "state.json").read_text())


def steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in folder, oldest first."""
    return sorted(int(p.name) for p in folder.glob("[0-9]*") if p.name.isdigit()) if folder.is_dir() else []


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint, if there is one."""
    found = steps(folder)
    return folder / f"{found[-1]:06d}" if found else None


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
