"""Tables in Parquet and Arrow files. The only user of pyarrow, which the extra `data` installs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import UserError
from ..sources import CAPTIONS, PYARROW


def parquet() -> ModuleType:
    """pyarrow.parquet.

    Raises:
        UserError: it is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(PYARROW) from None
    return pyarrow.parquet


def column(path: Path) -> Iterator[str]:
    """The captions of a Parquet file, "" where there is none.

    Raises:
        UserError: it cannot be read, or has no column of captions.
    """
    table = opened(path)
    name = caption_column(path, table.schema_arrow.names)
    for batch in table.iter_batches(columns=[name]):
        yield from (text or "" for text in batch.column(0).to_pylist())


def opened(path: Path) -> Any:
    """A Parquet file.

    Raises:
        UserError: it cannot be read.
    """
    pq = parquet()
    try:
        return pq.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise UserError(f"{path} cannot be read as Parquet ({error}); write it again") from None


def caption_column(path: Path, names: list[str]) -> str:
    """The column that holds captions.

    Raises:
        UserError: there is none.
    """
    for name in CAPTIONS:
        if name in names:
            return name
    raise UserError(f"{path} has no column {', '.join(CAPTIONS[:-1])} or {CAPTIONS[-1]}, only {', '.join(names)}; rename one")
