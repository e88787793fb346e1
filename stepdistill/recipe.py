"""Recipes: read strictly, with every problem told at once, and written back."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import UserError, one_line
from .families import FAMILIES
from .fields import Field, Place, convert, described, fields_of, numbers, places, texts, unfit
from .listing import find_recipe
from .sections import SECTIONS, Data, Eval, Keys, Lora, Model, Optim, Pairs, Recipe, Train, check
from .sources import suggestion
from .strategies import STRATEGIES
from .strategy_names import find_strategy, strategy_name
from .yaml_tree import DEPTH, Unreadable, cut, dumped, read_bytes, read_tree, shown

__all__ = ["Data", "Eval", "Lora", "Model", "Optim", "Pairs", "Recipe", "RecipeError", "Train", "differences"]
__all__ += ["dump_recipe", "load_recipe", "shown", "strategy_name"]
LAST = 10**9  # the line by which problems of the command line are sorted
MOST = 50  # problems that are told
NAME = 100  # characters of a run's name: names of files are made of it


class RecipeError(UserError):
    """All that is wrong with a recipe: `problems` holds lines `file:line  key: value ... rule; remedy`."""

    def __init__(self, problems: Sequence[str]):
        self.problems = [one_line(text) for text in problems[:MOST]]
        if len(problems) > MOST:
            self.problems.append(f"and {len(problems) - MOST:,} more; mend these first")
        super().__init__("\n".join(self.problems))


def load_recipe(
    path_or_name: str | Path, overrides: Sequence[str] = (), data: bool = True, pairs: bool = True, there: bool = True
) -> Recipe:
    """The recipe in a file, or the shipped one of that name, with `dotted.key=value` overrides, checked throughout.

    data: whether its prompts, pictures and pairs must be there too; sampling a finished run does without them.
    pairs: whether the folder of pairs that it names must be complete; it is not before they are made.
    there: whether all that it names must exist; if not, what does not is checked for its form alone.

    Raises:
        UserError: there is no such recipe.
        RecipeError: every problem of the file, the overrides and the sources they name, at once.
    """
    file = find_recipe(path_or_name)
    try:
        text = read_bytes(file)
    except Unreadable as error:
        raise RecipeError([f"{file}  {error}"]) from None
    return read_recipe(text, file, overrides, data, pairs, there)


def read_recipe(
    text: bytes | str, file: Path, overrides: Sequence[str] = (), data: bool = True, pairs: bool = True, there: bool = True
) -> Recipe:
    """The recipe in a text; `file` is where problems are said to be, and names a recipe that does not name itself.

    Raises:
        RecipeError: as `load_recipe`, whose other arguments these are.
    """
    draft = Draft(file, text)
    for override in overrides:
        draft.override(override)
    whole = "lora" in draft.tree and draft.tree["lora"] is None
    parts = {key: None if key == "lora" and whole else draft.section(kind, key) for key, kind in SECTIONS.items()}
    trusted = draft.trusted()
    parts |= {"strategy": draft.strategy(trusted), "name": draft.name(file.stem), "trust_remote_code": trusted}
    for key in (key for key in draft.tree if key not in parts):
        draft.unknown((key,), list(parts))
    strategy = parts["strategy"]
    absent = tuple(key for key, there in {"data.": data, "pairs.": data and pairs}.items() if not there)
    values = {key: value for key, value in draft.values.items() if not key.startswith(absent)}
    for keys, message in check(values, strategy, strategy and strategy_name(strategy), FAMILIES, there):
        draft.blame(keys, message)
    if draft.problems:
        raise RecipeError([text for _, text in sorted(draft.problems, key=lambda problem: problem[0])])
    return Recipe(**parts)


class Draft:
    """A recipe as it was written: the tree of its values, the line of every key, and the problems found so far."""

    def __init__(self, file: Path, text: bytes | str):
        """Raises RecipeError if the text, which is the file's, is not readable YAML."""
        self.file = file
        self.values: dict[str, Any] = {}  # by dotted key, those that are right in themselves
        self.problems: list[tuple[int, str]] = []
        try:
            written = read_tree(text)
        except Unreadable as error:
            where = f"{file}:{error.line}" if error.line else str(file)
            raise RecipeError([f"{where}  {error}"]) from None
        self.tree, self.lines = {} if written.values is None else written.values, written.lines
        if not isinstance(self.tree, dict):
            raise RecipeError([f"{file}:1  {shown(self.tree)} is no recipe; write sections: {', '.join(SECTIONS)}"])
        for keys, first, line in written.twice:
            self.blame(keys, f"occurs twice, first in line {first}; keep one", line)

    def blame(self, keys: Keys, message: str, line: int | None = None) -> None:
        """Note a problem of a key, at a line, otherwise at its own or that of the nearest section around it."""
        if line is None:  # lines: keys -> line; 0 is the command line
            line = next((self.lines[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in self.lines), 1)
        where = f"{self.file}:{line}" if line else "command line"
        self.problems.append((line or LAST, f"{where}  {cut('.'.join(keys))}: {message}"))

    def unknown(self, keys: Keys, known: Sequence[str], more: str = "") -> None:
        """Note an unknown key; suggest the nearest known one, or the section that has it, or list what there is."""
        if len(self.problems) > MOST:  # which are not told: looking for near words takes time
            return self.blame(keys, "unknown key")
        homes = [f"{name}.{keys[-1]}" for name, kind in SECTIONS.items() if keys[-1] in fields_of(kind)]
        hint = suggestion(keys[-1], known) or (f"; did you mean '{homes[0]}'?" if homes else "")
        if (dotted := keys[-1].split("."))[0] in SECTIONS and len(keys) == 1 < len(dotted):
            hint = f"; points are of the command line: in a file, write {dotted[0]}: {{{'.'.join(dotted[1:])}: ...}}"
        self.blame(keys, f"unknown key{hint or '; there are ' + ', '.join(known)}{more}")

    def override(self, text: str) -> None:
        """Put `dotted.key=value` into the tree; the value is YAML."""
        name, equals, value = text.partition("=")
        keys = tuple(name.strip().split("."))
        if not equals or not all(keys) or len(keys) > DEPTH:
            self.problems.append((LAST, f"command line  {cut(text)}: an override reads key=value, as in train.steps=500"))
            return
        try:
            written = read_tree(value)
        except Unreadable as error:
            told = f"command line  {cut(text)}: {cut(ascii(value))} is not a YAML value ({error}); quote it"
            self.problems.append((LAST, told))
            return
        self.lines |= {(*keys, *inner): 0 for inner in written.lines}
        for inner, _, _ in written.twice:
            self.blame((*keys, *inner), "occurs twice; keep one", 0)
        at = self.tree
        for n, key in enumerate(keys[:-1], 1):
            if not isinstance(at.get(key), dict):  # also null: lora.rank=8 overrides lora: null
                at[key], self.lines[keys[:n]] = {}, 0
            at = at[key]
        at[keys[-1]], self.lines[keys] = written.values, 0

    def section(self, kind: type, key: str) -> Any:
        """The dataclass `kind` from the section `key`; None if that cannot be made. Its problems are noted."""
        given = self.mapping(key)
        return None if given is None else self.fill(kind, given, key)

    def mapping(self, key: str) -> dict[str, Any] | None:
        """The values of a section, empty if it was left out."""
        given = self.tree.get(key, {})
        if not isinstance(given, dict):
            self.blame((key,), f"{shown(given)} must be a section of keys, as in {key}: {{key: value}}")
            return None
        return given

    def fill(self, kind: type, given: Mapping[str, Any], key: str, more: str = "") -> Any:
        """The dataclass `kind` from values; None if that cannot be made. Its problems are noted."""
        known, values = fields_of(kind), {}
        for name in (name for name in given if name not in known):
            self.unknown((key, name), list(known), more)
        for name, spec in known.items():
            if name not in given and spec.default is dataclasses.MISSING:
                self.blame((key, name), f"is missing; add {key}.{name}, {described(spec.type)}: {spec.comment}")
                continue
            try:
                values[name] = _checked(given[name], spec) if name in given else spec.default
            except ValueError as error:
                self.blame((key, name), f"{error}{more}")
        self.values |= {f"{key}.{name}": value for name, value in values.items()}
        return kind(**values) if len(values) == len(known) else None

    def trusted(self) -> bool:
        """Whether the recipe may name code of other packages."""
        given = self.tree.get("trust_remote_code", False)
        if not isinstance(given, bool):
            self.blame(("trust_remote_code",), f"{shown(given)} must be true or false")
        return given is True

    def strategy(self, trusted: bool) -> Any:
        """The strategy; None if it cannot be made. Its problems are noted. trusted: it may be of another package."""
        given = self.mapping("strategy")
        if given is None:
            return None
        name, others = given.get("name"), {key: value for key, value in given.items() if key != "name"}
        if name is None:
            self.blame(("strategy", "name"), f"is missing; name one of {', '.join(STRATEGIES)}")
            return None
        try:
            kind = find_strategy(name if isinstance(name, str) else f"'{shown(name)}'", trusted)
        except UserError as error:
            self.blame(("strategy", "name"), str(error))
            return None
        trust = " --trust-remote-code" * (":" in name)
        return self.fill(kind, others, "strategy", f" (see: stepdistill explain {name}{trust})")

    def name(self, default: str) -> str:
        """The run's name: a safe folder name that stock loaders accept in file names."""
        name = self.tree.get("name", default)
        if not isinstance(name, str):
            self.blame(("name",), f"{shown(name)} must be text; put it in quotes")
        elif len(name) > NAME:
            self.blame(("name",), f"{cut(name)} must have at most {NAME} characters (files are named after it); shorten it")
        elif not re.fullmatch(r"\w[\w.-]*", name):
            self.blame(("name",), f"{shown(name)} must be letters, digits, and . _ - (a folder is named after it)")
        elif any(word in name.lower() for word in ("scheduler", "optimizer", "checkpoint")):
            self.blame(("name",), f"{name} has scheduler, optimizer or checkpoint in it: diffusers skips such files")
        return name


def _checked(value: Any, spec: Field) -> Any:
    """The value as its field's type. Raises ValueError with value, rule and remedy."""
    if isinstance(value, str) and value in spec.refused:
        raise ValueError(f"{value} is refused: {spec.refused[value]}")
    try:
        result = convert(value, spec.type)
    except TypeError:
        quotes = "; put it in quotes" if str in places(spec.type) and isinstance(value, bool | int | float) else ""
        raise ValueError(f"{shown(value)} must be {described(spec.type)}{quotes}") from None
    if spec.range and any(number not in spec.range for number in numbers(result)):
        raise ValueError(f"{shown(value)} is out of range; it must be {spec.range}")
    for text in texts(result):
        if fault := unfit(text, Place in places(spec.type)):
            raise ValueError(f"{shown(text)} {fault}")
    return result


def to_tree(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain nested values, as they stand in YAML."""
    tree = _plain(recipe)
    return tree | {"strategy": {"name": strategy_name(recipe.strategy)} | tree["strategy"]}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {name: _plain(getattr(value, name)) for name in fields_of(type(value))}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def from_tree(tree: Mapping[str, Any], file: Path) -> Recipe:
    """The recipe that `to_tree` gave, found in a file; its data need not be there.

    Raises:
        RecipeError: it is none, or none of this version's.
    """
    return read_recipe(dumped(tree), file, data=False)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every key written out; load_recipe reads the same recipe from it."""
    return dumped(to_tree(recipe))


def differences(a: Recipe, b: Recipe) -> list[str]:
    """The dotted keys in which two recipes differ."""
    return list(_differ(to_tree(a), to_tree(b), ""))


def _differ(a: Any, b: Any, at: str) -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(b.keys() - a.keys())]:
            yield from _differ(a.get(key), b.get(key), f"{at}.{key}".lstrip("."))
    elif a != b:
        yield at
