"""Result files: rows of figures and their provenance; and which figures compare."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import write_text
from ..foreign import read_json

FORMAT = 1  # of result files


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(field, its value in one, in the other) of all that decides figures and differs in two provenances."""
    left, right = dict(leaves(one.get("compared", {}))), dict(leaves(other.get("compared", {})))
    names = dict.fromkeys((*left, *right))
    return [(name, left.get(name), right.get(name)) for name in names if left.get(name) != right.get(name)]


def compare(one: Mapping[str, Any], other: Mapping[str, Any], names: tuple[str, str] = ("one", "the other")) -> None:
    """Raises UserError, with each field that differs and both its values, where figures of two provenances do not compare."""
    if found := differences(one, other):
        fields = "; ".join(f"{name} is {a} and {b}" for name, a, b in found)
        raise UserError(f"figures of {names[0]} and {names[1]} do not compare: {fields}. Measure both alike: stepdistill eval")


def read(path: Path) -> dict[str, Any]:
    """A result file, RUN/eval/<preset>.json: {"format", "rows", "provenance"}.

    Raises:
        UserError: it is none, or of another version.
    """
    try:
        result = read_json(path)
        rows, about = result["rows"], result["provenance"]
        right = result["format"] == FORMAT and isinstance(rows, list) and isinstance(about["compared"], Mapping)
        right = right and all(isinstance(row, Mapping) and "who" in row for row in rows)
    except (OSError, ValueError, KeyError, TypeError):
        right = False
    if not right:
        raise unreadable(path)
    return result


def unreadable(path: Path) -> UserError:
    """What is told of a result file that is none."""
    run = shlex.quote(str(path.parents[1]))
    return UserError(f"{path} holds no figures that this version reads; measure them again: stepdistill eval {run}")


def write(path: Path, rows: list[dict[str, Any]], provenance: Mapping[str, Any]) -> None:
    """Write a result file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"format": FORMAT, "rows": rows, "provenance": provenance}, indent=1))


def leaves(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """(name in dots, value) of all that is no mapping."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{above}{name}.")
        else:
            yield above + name, list(value) if isinstance(value, tuple) else value
