"""Tables in Parquet and Arrow files: prompts, or pictures with captions, as Hugging Face's `datasets` keeps them. The only user
of pyarrow, which the extra `data` installs.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import UserError
from ..foreign import escapes, read_json, shorten
from ..sources import CAPTIONS, PYARROW
from .picture import Picture, Skipped, file_key

STATE = "state.json"  # of a folder that `save_to_disk` wrote; it names the folder's tables


def texts(path: Path) -> Iterator[str]:
    """The captions of a Parquet file, "" where there is none.

    Raises:
        UserError: it cannot be read, or has no column of captions.
    """
    try:
        table = opened(path)
        name = column(table.schema.names, CAPTIONS)
        for part in range(table.parts):
            yield from (text or "" for text in table.read(part, [name])[name].to_pylist())
    except UserError:
        raise
    except (OSError, ValueError) as error:  # pyarrow's own errors are among these
        raise UserError(f"{path} cannot be read as Parquet ({error}); write it again") from None


def table_pictures(folder: Path) -> Iterator[Picture | Skipped]:
    """All pictures of a folder's tables: columns with picture files in them, and captions.

    Raises:
        UserError: there are tables, but no pyarrow.
    """
    saved = [(state, name) for state in folder.rglob(STATE) for name in data_files(state)]
    for state, name in saved:
        if escapes(name):
            yield Skipped(f"{state.relative_to(folder)}", f"is refused: {shorten(name)} leaves its folder")
    for path in sorted({*folder.rglob("*.parquet"), *(state.parent / name for state, name in saved if not escapes(name))}):
        yield from rows(path, str(path.relative_to(folder)))


def data_files(state: Path) -> list[str]:
    """Names of the tables of a saved folder."""
    try:
        return [str(file["filename"]) for file in read_json(state)["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):  # another program's
        return []


def rows(path: Path, name: str) -> Iterator[Picture | Skipped]:
    try:
        table, n = opened(path), 0
        caption, pixels = column(table.schema.names, CAPTIONS), picture_column(table.schema)
        for part in range(table.parts):
            for i, text in enumerate(table.read(part, [caption])[caption].to_pylist()):
                if isinstance(text, str) and text.strip():
                    yield Picture(f"{name}:{n}", file_key(path, n), text.strip(), partial(picture, path, part, i, pixels))
                else:
                    yield Skipped(f"{name}:{n}", "has no caption")
                n += 1
    except UserError:
        raise
    except (OSError, ValueError) as error:
        yield Skipped(name, f"is damaged, or no table of pictures ({error})")


def picture(path: Path, part: int, row: int, name: str) -> Image.Image:
    """The picture in a row: its file's bytes, by themselves or under "bytes"."""
    value = held(path, part, name)[row].as_py()
    return Image.open(BytesIO(value["bytes"] if isinstance(value, dict) else value))


@lru_cache(maxsize=2)
def held(path: Path, part: int, name: str) -> Any:
    """The column of pictures of one part of a table."""
    return opened(path).read(part, [name])[name]


@lru_cache(maxsize=8)
def opened(path: Path) -> Parquet | Arrow:
    """Raises UserError without pyarrow; OSError or ValueError for a damaged file."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(PYARROW) from None
    return Parquet(pyarrow.parquet.ParquetFile(path)) if path.suffix == ".parquet" else Arrow(pyarrow, path)


class Parquet:
    """Its parts are row groups, read from the disk one by one."""

    def __init__(self, file: Any):
        self.file, self.schema, self.parts = file, file.schema_arrow, file.num_row_groups

    def read(self, part: int, names: list[str]) -> Any:
        return self.file.read_row_group(part, columns=names)


class Arrow:
    """The stream of batches that `save_to_disk` writes, mapped into memory."""

    def __init__(self, pyarrow: Any, path: Path):
        self.table = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_all()
        self.schema, self.parts = self.table.schema, 1

    def read(self, _part: int, names: list[str]) -> Any:
        return self.table.select(names)


def column(have: list[str], wanted: tuple[str, ...]) -> str:
    """The first wanted column that a table has; raises ValueError if it has none."""
    for name in wanted:
        if name in have:
            return name
    raise ValueError(f"no column {', '.join(wanted[:-1])} or {wanted[-1]}, only {', '.join(have)}")


def picture_column(schema: Any) -> str:
    """The first column of files: bytes, or a struct with bytes; raises ValueError if there is none."""
    for field in schema:
        kind = str(field.type)
        if kind in ("binary", "large_binary") or kind.startswith("struct<bytes: "):
            return field.name
    raise ValueError(f"no column of pictures, only {', '.join(schema.names)}")
