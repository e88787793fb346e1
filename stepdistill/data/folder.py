"""A folder of picture files, each with its caption in a .txt file beside it or in a metadata.jsonl, as a source of pictures."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from PIL import Image

from ..foreign import TEXT, escapes, leaves, parse_json
from ..sources import METADATA, PICTURES
from .picture import Picture, Skipped, file_key
from .prompts import caption_of


def folder_pictures(folder: Path) -> Iterator[Picture | Skipped]:
    """All pictures of a folder and of those within, by name."""
    told: dict[Path, str] = {}
    for path in sorted(folder.rglob(METADATA)):
        if leaves(path, folder):
            yield Skipped(str(path.relative_to(folder)), "is refused: it is a link that leaves the folder")
            continue
        for n, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            try:
                row = parse_json(line)
                if escapes(row["file_name"]):
                    yield Skipped(f"{path.relative_to(folder)}:{n}", "is refused: its file_name leaves the folder")
                    continue
                told[path.parent / row["file_name"]] = caption_of(row)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                if line.strip():
                    yield Skipped(f"{path.relative_to(folder)}:{n}", f"is no file_name with a text ({error})")
    for path in sorted(file for file in folder.rglob("*") if file.suffix.lower() in PICTURES):
        name = str(path.relative_to(folder))
        try:
            caption = told[path] if path in told else beside(path, folder)
            if not caption.strip():
                raise ValueError("it is empty")
            yield Picture(name, file_key(path), caption.strip(), partial(opened, path))
        except (OSError, ValueError) as error:
            yield Skipped(name, f"has no caption ({getattr(error, 'strerror', None) or error})")


def beside(path: Path, folder: Path) -> str:
    """The text beside a picture; raises OSError or ValueError if there is none that may be read."""
    text = path.with_suffix(".txt")
    if leaves(text, folder):
        raise ValueError("its .txt is a link that leaves the folder")
    if not text.is_file():
        raise FileNotFoundError(2, "No such file or directory")
    with text.open("rb") as file:
        said = file.read(TEXT + 1)
    if len(said) > TEXT:
        raise ValueError(f"its .txt is longer than {TEXT} bytes")
    return said.decode("utf-8")


def opened(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        picture.load()
        return picture
