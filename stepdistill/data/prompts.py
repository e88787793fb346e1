"""Prompts from files, from the grammar, or from the embedded world; none is read beyond those that are asked for."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..fields import unfit
from ..foreign import parse_json
from ..sources import CAPTIONS, EMBEDDED_DATA, EMBEDDED_PROMPTS
from ..tiny.world import scenes
from .grammar import sentences
from .tables import texts

TINY_COUNT, TINY_SEED = 4096, 31  # drawings of the embedded world that students train on, unless data.count says else
GRAMMAR_COUNT = 2048  # prompts of the grammar, unless data.count says else


def read_prompts(source: str, count: int | None = None) -> list[str]:
    """The first `count` prompts (None: all; of what has no end, a few thousand); empty ones are left out.

    Raises:
        UserError: a file of prompts cannot be read, or holds none.
    """
    if source == EMBEDDED_DATA:
        return [scene.caption for scene in scenes(count or TINY_COUNT, TINY_SEED, "seen")]
    if source == EMBEDDED_PROMPTS:
        return list(islice(sentences(), count or GRAMMAR_COUNT))
    path = Path(source)
    try:
        prompts = list(islice(usable(path), count))
    except (OSError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({error}); give a file of prompts in UTF-8") from None
    if not prompts:
        raise UserError(f"{path} holds no prompt; write one prompt a line, or in its column {' or '.join(CAPTIONS)}")
    return prompts


def usable(path: Path) -> Iterator[str]:
    """The prompts of a file that are not empty.

    Raises:
        UserError: one is too long, or holds what is no text.
    """
    for n, text in FILES.get(path.suffix.lower(), text_lines)(path):
        if not isinstance(text, str):
            raise UserError(f"{path}:{n} {lacking('a row')}")
        if prompt := text.strip():
            if fault := unfit(prompt, place=False):
                raise UserError(f"{path}:{n} the prompt {prompt[:60]!r} {fault}")
            yield prompt


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """A prompt a line, with the line's number.

    Raises:
        UserError: a line is not in UTF-8.
    """
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:  # csv reads the ends of lines itself
        for n, line in enumerate(file, 1):
            try:
                line.encode()
            except UnicodeEncodeError:
                raise UserError(f"{path}:{n} is not text in UTF-8; save the file as UTF-8") from None
            yield n, line


def json_lines(path: Path) -> Iterator[tuple[int, str]]:
    """A JSON object a line."""
    for n, line in text_lines(path):
        if line.strip():
            try:
                yield n, caption_of(parse_json(line))
            except (ValueError, TypeError):
                raise UserError(f"{path}:{n} {lacking('a JSON object')}") from None


def csv_rows(path: Path) -> Iterator[tuple[int, str]]:
    """Comma-separated values whose first line names the columns."""
    rows = csv.DictReader(line for _, line in text_lines(path))
    for row in rows:
        try:
            yield rows.line_num, caption_of(row)
        except (ValueError, TypeError):
            raise UserError(f"{path}:{rows.line_num} {lacking('a row')}") from None


def table_rows(path: Path) -> Iterator[tuple[int, str]]:
    """The captions of a Parquet file."""
    return enumerate(texts(path), 1)


def caption_of(row: dict[str, Any]) -> str:
    """What a row says: the first of the columns that hold captions.

    Raises:
        ValueError, TypeError: it has none, or it is no text.
    """
    for name in CAPTIONS:
        if name in row:
            if not isinstance(row[name], str):
                raise TypeError(name)
            return row[name]
    raise ValueError("no caption")


def lacking(what: str) -> str:
    return f"is not {what} with a text under {', '.join(CAPTIONS[:-1])} or {CAPTIONS[-1]}; mend or remove it"


FILES: dict[str, Callable[[Path], Iterator[tuple[int, str]]]] = {  # each text with its line or row
    ".jsonl": json_lines,
    ".csv": csv_rows,
    ".parquet": table_rows,
}
