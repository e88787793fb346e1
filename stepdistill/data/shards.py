"""Webdataset shards, .tar files in which x.jpg is followed by x.txt or x.json, as a source of pictures. Nothing is unpacked."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from functools import partial
from io import BytesIO
from pathlib import Path, PurePosixPath

from PIL import Image

from ..foreign import TEXT, escapes, parse_json
from ..sources import PICTURES
from .picture import LARGEST, Picture, Skipped, file_key
from .prompts import caption_of


def shard_pictures(folder: Path) -> Iterator[Picture | Skipped]:
    """All pictures of a folder's shards, those of a shard that is cut short as far as it goes."""
    for path in sorted(folder.rglob("*.tar")):
        yield from shard(path, str(path.relative_to(folder)))


def shard(path: Path, name: str) -> Iterator[Picture | Skipped]:
    pictures: dict[str, tarfile.TarInfo] = {}
    captions: dict[str, tarfile.TarInfo] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                place = PurePosixPath(member.name)
                suffix = place.suffix.lower()
                if escapes(member.name):
                    yield Skipped(f"{name}/{member.name}", "is refused: its path leaves the shard's folder")
                elif member.islnk() or member.issym() or member.isdev():
                    yield Skipped(f"{name}/{member.name}", "is refused: it is a link or a device, not a file")
                elif member.size > LARGEST:
                    yield Skipped(f"{name}/{member.name}", f"is refused: it is larger than {LARGEST} bytes")
                elif member.isreg() and not member.issparse():
                    kind = pictures if suffix in PICTURES else captions if suffix in (".txt", ".json") else {}
                    kind.setdefault(str(place.with_suffix("")), member)
    except (tarfile.TarError, OSError, EOFError, ValueError, MemoryError, RecursionError) as error:
        yield Skipped(name, f"is damaged ({error}); what comes before that is used")
    for key, member in pictures.items():
        told = f"{name}/{member.name}"
        try:
            caption = read_caption(path, captions[key])
            yield Picture(told, file_key(path, member.name), caption, partial(opened, path, member.offset_data, member.size))
        except KeyError:
            yield Skipped(told, "has no caption (no .txt or .json)")
        except (ValueError, TypeError, OSError) as error:
            yield Skipped(told, f"has no caption ({error})")


def read_caption(path: Path, member: tarfile.TarInfo) -> str:
    """Raises ValueError or TypeError for what is none."""
    if member.size > TEXT:
        raise ValueError(f"it is longer than {TEXT} bytes")
    text = read(path, member.offset_data, member.size).decode()
    caption = caption_of(parse_json(text)) if member.name.lower().endswith(".json") else text
    if not caption.strip():
        raise ValueError("it is empty")
    return caption.strip()


def opened(path: Path, start: int, size: int) -> Image.Image:
    return Image.open(BytesIO(read(path, start, size)))


def read(path: Path, start: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(size)
