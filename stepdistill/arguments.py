"""What words of a command line mean: numbers, lists, files; each raises argparse's own error for what is none."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from .errors import one_line

FORMATS = ("diffusers", "kohya", "fused")
LARGE = 10**6  # of whole numbers


class Parser(argparse.ArgumentParser):
    """Its messages are lines that a terminal shows as they are, whatever they quote."""

    def error(self, message: str) -> None:
        super().error(one_line(message))


def place(text: str) -> Path:
    """A file or folder."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"'{text}' names no file or folder; give a name, or leave it out")
    return Path(text)


def formats(text: str) -> tuple[str, ...]:
    """The names in a list like diffusers,kohya."""
    chosen = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in chosen:
        if name not in FORMATS:
            raise argparse.ArgumentTypeError(f"unknown format {name}; there are {', '.join(FORMATS)}")
    if not chosen:
        raise argparse.ArgumentTypeError(f"'{text}' names no format; there are {', '.join(FORMATS)}")
    return chosen


def floats(text: str) -> tuple[float, ...]:
    """The numbers in a list like 1.0,0.7."""
    try:
        found = tuple(float(part) for part in text.split(","))
        if all(map(math.isfinite, found)):
            return found
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text} must be finite numbers with commas between them, as in 1.0,0.7")


def whole(text: str, low: int = 0) -> int:
    """A whole number of at least 0."""
    if text.isdecimal() and len(text) <= len(str(LARGE)) and low <= int(text) <= LARGE:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text} must be a whole number, at least {low} and at most {LARGE}")


def scale(text: str) -> float:
    """A guidance scale."""
    try:
        if 1 <= float(text) <= 1000:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text} must be a number, at least 1 and at most 1000")


def words(text: str) -> tuple[str, ...]:
    """The words in a list like one,two."""
    return tuple(word for part in text.split(",") if (word := part.strip()))


def counts(text: str) -> tuple[int, ...]:
    """The whole numbers, at least 1, in a list like 1,2,4."""
    return tuple(positive(word) for word in words(text))


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return whole(text, 1)
