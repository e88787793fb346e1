"""A folder of picture files, each with its caption in a .txt file beside it or in a metadata.jsonl, as a source of pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from PIL import Image

from ..sources import METADATA, PICTURES
from .picture import Picture, Skipped, file_key
from .prompts import caption_of


def folder_pictures(folder: Path) -> Iterator[Picture | Skipped]:
    """All pictures of a folder and of those within, by name."""
    told: dict[Path, str] = {}
    for path in sorted(folder.rglob(METADATA)):
        for n, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            try:
                row = json.loads(line)
                told[path.parent / row["file_name"]] = caption_of(row)
            except (ValueError, TypeError, KeyError) as error:
                if line.strip():
                    yield Skipped(f"{path.relative_to(folder)}:{n}", f"is no file_name with a text ({error})")
    for path in sorted(file for file in folder.rglob("*") if file.suffix.lower() in PICTURES):
        name = str(path.relative_to(folder))
        try:
            caption = told[path] if path in told else path.with_suffix(".txt").read_text(encoding="utf-8")
            if not caption.strip():
                raise ValueError("it is empty")
            yield Picture(name, file_key(path), caption.strip(), partial(opened, path))
        except (OSError, ValueError) as error:
            yield Skipped(name, f"has no caption ({getattr(error, 'strerror', None) or error})")


def opened(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        picture.load()
        return picture
