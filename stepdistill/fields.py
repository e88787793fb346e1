"""What a dataclass declares about its fields: type, range and comment. Recipes are checked and explained from this.

    rank: int = ranged(64, low=1, high=1024)  # rank of the adapters

No third-party import: strategies and families may declare ranges, and the command line may read them.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import math
import os
import sys
import textwrap
import tokenize
import types
import typing
from collections.abc import Mapping
from io import StringIO
from typing import Any

TEXT = 10_000  # characters of a text, such as a prompt
PATH, PART = 4000, 255  # bytes of a path, and of a name in it, that file systems take
Place = typing.NewType("Place", str)  # text that may name a file or folder: ~ becomes the home folder


@dataclasses.dataclass(frozen=True)
class Range:
    """An interval of numbers; `low` and `high` belong to it, `above` and `below` do not."""

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        words = {"above": self.above, "at least": self.low, "below": self.below, "at most": self.high}
        spelt = {word: f"{bound:g}" if isinstance(bound, float) else str(bound) for word, bound in words.items()}
        return " and ".join(f"{word} {spelt[word]}" for word, bound in words.items() if bound is not None)


def ranged(default: Any = dataclasses.MISSING, **bounds: float) -> Any:
    """A dataclass field whose number, or whose every number, lies in Range(**bounds). Without default: required."""
    return dataclasses.field(default=default, metadata={"range": Range(**bounds)})


@dataclasses.dataclass(frozen=True)
class Field:
    """One field as a user meets it. `default` is dataclasses.MISSING where a value is required."""

    name: str
    type: Any
    default: Any
    range: Range | None
    refused: Mapping[Any, str]  # values that people try, and why they are refused
    comment: str


@functools.cache
def fields_of(cls: type) -> dict[str, Field]:
    """The fields of a dataclass that can be set, by name, in the order of declaration."""
    hints, comments = typing.get_type_hints(cls), _comments(cls)
    return {
        f.name: Field(
            f.name,
            hints[f.name],
            f.default if f.default_factory is dataclasses.MISSING else f.default_factory(),
            f.metadata.get("range"),
            f.metadata.get("refused", {}),
            comments.get(f.name, ""),
        )
        for f in dataclasses.fields(cls)
        if f.init
    }


def _comments(cls: type) -> dict[str, str]:
    """The comment that trails each field's declaration, else the comment lines directly above it; parents first."""
    found: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(owner) or owner.__module__ not in sys.modules:
            continue
        try:
            source = textwrap.dedent(inspect.getsource(owner))
        except OSError:  # made at run time, without a source file
            continue
        lines = source.splitlines()
        notes = {
            token.start[0]: token.string.lstrip("# ").rstrip()
            for token in tokenize.generate_tokens(StringIO(source).readline)
            if token.type == tokenize.COMMENT
        }
        for item in ast.parse(source).body[0].body:
            if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
                continue
            trailing = [notes[n] for n in range(item.lineno, item.end_lineno + 1) if n in notes]
            above, line = [], item.lineno - 1
            while line in notes and lines[line - 1].lstrip().startswith("#"):
                above.insert(0, notes[line])
                line -= 1
            found[item.target.id] = " ".join(trailing or above)
    return found


def convert(value: Any, kind: Any) -> Any:
    """`value`, as YAML gave it, as the type `kind`; raises TypeError if it is not one.

    PyYAML reads 5e-5 as text and `no` as False: both come out as their field's type demands. Booleans are no numbers.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Place:
        return os.path.expanduser(convert(value, str))
    if origin in (typing.Union, types.UnionType):
        for choice in sorted(inner, key=lambda t: t in (str, Place)):  # text last: it would take "5e-5" from float
            try:
                return convert(value, choice)
            except TypeError:
                pass
        raise TypeError
    if origin is typing.Literal:
        if isinstance(value, bool):
            value = next((c for c in inner if c in (("no", "off", "false"), ("yes", "on", "true"))[value]), value)
        if value in inner and type(value) in {type(c) for c in inner}:
            return value
    elif origin in (tuple, list, set, frozenset) and isinstance(value, list | tuple):
        if origin is tuple and inner[-1] is not Ellipsis:
            if len(value) == len(inner):
                return tuple(convert(v, t) for v, t in zip(value, inner, strict=True))
        else:
            return origin(convert(v, inner[0]) for v in value)
    elif kind is None or kind is type(None):
        if value is None:
            return None
    elif kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        number = _number(value)
        if math.isfinite(number):
            return number
    elif kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    elif kind is int and isinstance(value, float | str) and (number := _number(value)).is_integer():
        return int(number)
    elif kind in (bool, str) and isinstance(value, kind):
        return value
    raise TypeError


def _number(value: int | float | str) -> float:
    """The value as a float; not a number if it is text that reads otherwise."""
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


def described(kind: Any) -> str:
    """A type in words, as in "must be null or a whole number"."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(described(choice) for choice in sorted(inner, key=lambda t: t is not type(None)))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, inner)) if len(inner) > 1 else str(inner[0])
    if origin is tuple and inner[-1] is not Ellipsis:
        each = f"each {described(inner[0])}" if len(set(inner)) == 1 else ", ".join(map(described, inner))
        return f"a list of {len(inner)}, {each}"
    if origin in (tuple, list, set, frozenset):
        return f"a list, each {described(inner[0])}"
    words = {float: "a number", int: "a whole number", bool: "true or false", type(None): "null"}
    words |= {str: "text", Place: "text"}
    return words.get(kind, getattr(kind, "__name__", str(kind)))


def numbers(value: Any) -> list[float]:
    """The numbers in a value: itself, or those of a list."""
    if isinstance(value, list | tuple):
        return [number for item in value for number in numbers(item)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def texts(value: Any) -> list[str]:
    """The texts in a value: itself, or those of a list."""
    if isinstance(value, list | tuple):
        return [text for item in value for text in texts(item)]
    return [value] if isinstance(value, str) else []


def places(kind: Any) -> set[Any]:
    """The types that a type is made of, down to the last."""
    inner = typing.get_args(kind)
    return {kind}.union(*map(places, inner)) if inner and typing.get_origin(kind) is not typing.Literal else {kind}


def unfit(text: str, place: bool) -> str | None:
    """Why a text, or the name of a file or folder, cannot be used, and what to do; None if it can."""
    if not text.strip():
        return "is blank; write text, or leave the key out"
    if len(text) > TEXT:
        return f"must have at most {TEXT:,} characters; shorten it"
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        return "has half a character in it, which no file can hold; write the whole one"
    if "\0" in text or (place and not text.isprintable()):
        return "has characters in it that cannot be printed; remove them"
    if place and (len(os.fsencode(text)) > PATH or any(len(os.fsencode(part)) > PART for part in text.split("/"))):
        return f"is too long for a path (at most {PATH:,} bytes, {PART} between slashes); shorten it"
    return None
