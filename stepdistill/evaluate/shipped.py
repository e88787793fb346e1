"""Figures of the embedded teachers that ship with the package, so that nobody has to wait for them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ..sources import embedded_models


def key(folder: Path) -> str:
    """Changes when any file of the teacher does."""
    return hashlib.sha256((folder / "SHA256SUMS").read_bytes()).hexdigest()


def shipped(source: str, n: int) -> list[dict[str, Any]] | None:
    """The rows of an embedded teacher over n pictures; None if there are none for these weights and this n."""
    folder = embedded_models().get(source)
    path = folder and folder / "figures.json"
    if not path or not path.is_file():
        return None
    figures = json.loads(path.read_text())
    return figures["rows"] if figures["key"] == key(folder) and figures["n"] == n else None
