"""What anybody may have written, read within limits: JSON, safetensors, and names of files. Raises, and never runs code."""

from __future__ import annotations

import dataclasses
import errno
import json
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from .errors import UserError
from .fields import convert, described, fields_of, numbers

if TYPE_CHECKING:
    from torch import Tensor

BYTES = 2**22  # of a JSON file
DEPTH, ITEMS, TEXT = 32, 2**17, 2**16  # of a JSON value: lists in lists, entries of one, characters


def read_json(path: Path, most: int = BYTES) -> Any:
    """The value in a JSON file of at most so many bytes; lists in it may have as many entries.

    Raises:
        OSError: there is no file.
        ValueError: it is no JSON in UTF-8, or beyond the limits.
    """
    if not path.is_file():  # a pipe would be waited for
        raise FileNotFoundError(errno.ENOENT, "there is no such file", str(path))
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"it is longer than the {most} bytes that are read of such a file")
    return parse_json(data.decode("utf-8"), max(ITEMS, most // 2**5))


def parse_json(text: str, items: int = ITEMS) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none, or nested deeper, longer or larger than anything that is written here.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _limit(value, DEPTH, items)
    return value


def _limit(value: Any, depth: int, items: int) -> None:
    if isinstance(value, str) and len(value) > TEXT:
        raise ValueError(f"it holds a text of {len(value)} characters; at most {TEXT} are read")
    if not isinstance(value, dict | list):
        return
    if not depth:
        raise ValueError(f"it is nested deeper than {DEPTH}")
    if len(value) > items:
        raise ValueError(f"it holds {len(value)} entries in one; at most {items} are read")
    for item in value:
        _limit(item, depth - 1, items)
        if isinstance(value, dict):
            _limit(value[item], depth - 1, items)


def shaped(value: Any, kind: Any, at: str = "") -> Any:
    """A JSON value as the type `kind`: a dataclass by its fields and their ranges, or what annotations are made of.

    at: where it is, in dots, for the message.

    Raises:
        ValueError: it is not that.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return kind(**_fields(value, kind, at))
    if origin in (typing.Union, types.UnionType) and value is not None:
        return shaped(value, next(one for one in inner if one is not types.NoneType), at)
    if origin is dict and isinstance(value, dict):
        return {shaped(k, inner[0], at): shaped(x, inner[1], f"{at}.{k}"[:100]) for k, x in value.items()}
    if origin is tuple and isinstance(value, list) and (inner[-1] is Ellipsis or len(inner) == len(value)):
        kinds = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        return tuple(shaped(x, one, f"{at}.{k}") for k, (x, one) in enumerate(zip(value, kinds, strict=True)))
    try:
        return convert(value, kind)
    except TypeError:
        raise ValueError(f"{at} {shorten(value)} must be {described(kind)}") from None


def _fields(value: Any, kind: type, at: str) -> dict[str, Any]:
    known = fields_of(kind)
    if not isinstance(value, Mapping):
        raise ValueError(f"{at} {shorten(value)} must be an object")
    if odd := [name for name in value if name not in known]:
        raise ValueError(f"{at} has an unknown {shorten(odd[0])}")
    made = {}
    for name, spec in known.items():
        if name not in value:
            if spec.default is dataclasses.MISSING:
                raise ValueError(f"{at} lacks {name}")
            continue
        made[name] = shaped(value[name], spec.type, f"{at}.{name}".lstrip("."))
        if spec.range and any(number not in spec.range for number in numbers(made[name])):
            raise ValueError(f"{at}.{name} {shorten(made[name])} must be {spec.range}".lstrip("."))
    return made


def shorten(value: Any) -> str:
    """A value in at most 80 characters, on one line."""
    return repr(value)[:80]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU; its header is checked against the file before anything is made.

    Raises:
        UserError: it is missing, damaged, or no such file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} is no safetensors file that can be read ({str(error)[:200]}); write or fetch it again"
        ) from None


def is_plain(name: str) -> bool:
    """Whether a name is that of a file in a folder: no path, nothing hidden, nothing that a shell or Python reads otherwise."""
    return bool(re.fullmatch(r"\w[\w.-]{0,199}", name))


def escapes(name: str) -> bool:
    """Whether a relative path within an archive or a table leaves its folder."""
    place = PurePosixPath(name.replace("\\", "/"))
    return place.is_absolute() or ".." in place.parts or "\0" in name or bool(re.match(r"[A-Za-z]:", name))


def leaves(path: Path, folder: Path) -> bool:
    """Whether a path, links followed, lies outside of a folder; the hub's cache keeps the files of its folders beside them."""
    root = folder.resolve()
    snapshots = [above for above in root.parents if above.name == "snapshots" and (above.parent / "blobs").is_dir()]
    return not path.resolve().is_relative_to(snapshots[0].parent if snapshots else root)
