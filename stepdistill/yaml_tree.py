"""YAML as plain values, with the line of every key, read within limits; and written. The only user of yaml.

Recipes need little of YAML: mappings, lists, text, decimal numbers, true and false, null. What else there is, and takes people
by surprise or a reader down, is refused or taken as text: anchors (their copies grow exponentially), tags, dates, numbers of
base 8, 16 and 60.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

SIZE = 2**18  # bytes of a recipe
NODES = 10_000  # values and keys
DEPTH = 20  # of nesting
LONG = 200  # characters of a value that are shown

Keys = tuple[str, ...]  # a dotted key, split; of a list's item its number


class Unreadable(ValueError):
    """A text is no YAML that is read here; the message says why, and what to do; `line` is None where nobody knows."""

    def __init__(self, line: int | None, message: str):
        super().__init__(message)
        self.line = line


@dataclass
class Tree:
    """A text's values, None of an empty one."""

    values: Any = None
    lines: dict[Keys, int] = field(default_factory=dict)  # of the keys of mappings, where they occur last
    twice: list[tuple[Keys, int, int]] = field(default_factory=list)  # keys that occur again, with lines: first, and again


def read_bytes(file: Path) -> bytes:
    """A file's bytes, or (so that nobody waits for a large one) one more than a recipe may have.

    Raises:
        Unreadable: it cannot be opened.
    """
    try:
        with file.open("rb") as opened:
            return opened.read(SIZE + 1)
    except OSError as error:
        raise Unreadable(None, f"cannot be read ({error.strerror}); give a file that you may read") from None


def read_text(raw: bytes) -> str:
    """The text of a file.

    Raises:
        Unreadable: it is too long, or not in UTF-8.
    """
    if len(raw) > SIZE:
        raise Unreadable(
            None, f"has more than {SIZE:,} bytes, which no recipe needs; keep long lists of prompts in data.prompts"
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise Unreadable(line, f"byte {raw[error.start]:#04x} is no text in UTF-8; save the file as UTF-8") from None


def read_tree(text: bytes | str) -> Tree:
    """The values of one YAML document.

    Raises:
        Unreadable: it is none, or asks for what is not read; see the limits above.
    """
    if isinstance(text, bytes):
        text = read_text(text)
    if len(text) > SIZE:
        raise Unreadable(None, f"has {len(text):,} characters; at most {SIZE:,} are read")
    try:
        return Reader(text).document()
    except yaml.reader.ReaderError as error:
        character = ascii(chr(error.character))
        problem = f"character {character} is not allowed; remove it, or write it as an escape in double quotes"
        raise Unreadable(text.count("\n", 0, error.position) + 1, problem) from None
    except yaml.MarkedYAMLError as error:
        remedy = "indent with spaces" if "'\\t'" in error.problem else "mend it (text with : or # needs quotes)"
        raise Unreadable(error.problem_mark.line + 1, f"this is not valid YAML: {error.problem}; {remedy}") from None
    except (ValueError, OverflowError) as error:  # of int() and chr(), in escapes and versions
        if isinstance(error, Unreadable):
            raise
        raise Unreadable(None, f"this is not valid YAML: {error}; mend it") from None


class Reader:
    """Reads PyYAML's events, one after the other, into a tree; stops at the first that is beyond a limit."""

    def __init__(self, text: str):
        self.loader, self.tree, self.nodes = yaml.SafeLoader(text), Tree(), 0

    def document(self) -> Tree:
        while not isinstance(event := self.loader.get_event(), yaml.StreamEndEvent):
            if isinstance(event, yaml.DocumentStartEvent) and self.nodes:
                raise Unreadable(event.start_mark.line + 1, "a second document begins here; keep one, and remove ---")
            if isinstance(event, yaml.NodeEvent):
                self.tree.values = self.value(event, (), 0)
        return self.tree

    def value(self, event: yaml.NodeEvent, keys: Keys, depth: int) -> Any:
        """What begins with an event, read to its end."""
        line = event.start_mark.line + 1
        self.nodes += 1
        if self.nodes > NODES:
            raise Unreadable(line, f"there are more than {NODES:,} keys and values, which no recipe needs; remove some")
        if depth > DEPTH:
            raise Unreadable(line, f"lists and sections are nested more than {DEPTH} deep, which no recipe needs; remove some")
        if event.anchor is not None:
            sign = "*" if isinstance(event, yaml.AliasEvent) else "&"
            remedy = f"write the value itself, or quotes around text that begins with {sign}"
            raise Unreadable(line, f"{sign}{cut(event.anchor)}: anchors (&) and aliases (*) are not read; {remedy}")
        if event.tag is not None:
            raise Unreadable(line, f"{cut(event.tag)}: tags (!) are not read; write the plain value, or text in quotes")
        if isinstance(event, yaml.ScalarEvent):
            return plain(event.value) if event.implicit[0] else event.value
        if isinstance(event, yaml.SequenceStartEvent):
            items = []
            while not isinstance(item := self.loader.get_event(), yaml.SequenceEndEvent):
                items.append(self.value(item, (*keys, str(len(items))), depth + 1))
            return items
        return self.mapping(keys, depth)

    def mapping(self, keys: Keys, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not isinstance(event := self.loader.get_event(), yaml.MappingEndEvent):
            line = event.start_mark.line + 1
            name = event.value if isinstance(event, yaml.ScalarEvent) else None
            self.value(event, keys, depth + 1)
            if name is None:
                raise Unreadable(line, "a key must be a word, not a list or a section; mend it (text with { or [ needs quotes)")
            at = (*keys, name)
            if name in found:
                self.tree.twice.append((at, self.tree.lines[at], line))
            self.tree.lines[at] = line
            found[name] = self.value(self.loader.get_event(), at, depth + 1)
        return found


CONSTANTS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **{form: word in ("yes", "true", "on") for word in ("yes", "no", "true", "false", "on", "off") for form in
       (word, word.capitalize(), word.upper())},
    **{sign + form: float(sign + "inf") for sign in ("", "+", "-") for form in (".inf", ".Inf", ".INF")},
    **dict.fromkeys((".nan", ".NaN", ".NAN"), math.nan),
}  # fmt: skip


def plain(text: str) -> Any:
    """The value of text without quotes: a constant or a decimal number as YAML 1.1 spells it, otherwise the text.

    Numbers that no float holds stay text, and so are told as they were written; also 010, which is 8 or 10 to different people.
    """
    if text in CONSTANTS:
        return CONSTANTS[text]
    if len(text) > LONG:
        return text
    if re.fullmatch(r"[-+]?(0|[1-9][0-9_]*)", text):
        return int(text.replace("_", ""))
    if re.fullmatch(r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+][0-9]+)?", text):
        number = float(text.replace("_", ""))
        return number if math.isfinite(number) else text
    return text


def cut(text: str) -> str:
    """A text's beginning, if it is long."""
    return text if len(text) <= LONG else f"{text[:LONG]}... ({len(text):,} characters)"


def shown(value: Any) -> str:
    """A value as it would stand in YAML, in one line of ASCII, cut if it is long."""
    try:
        text = yaml.dump(value, Dumper=Inline, default_flow_style=True, width=10**6)
    except yaml.representer.RepresenterError:  # of another package's strategy
        text = ascii(value)
    return cut(text.replace("\n...", "").strip())


def dumped(tree: Mapping[str, Any]) -> str:
    """A tree as YAML: sections as blocks, lists on their key's line."""
    return yaml.dump(tree, Dumper=Blocks, sort_keys=False, width=120, allow_unicode=True)


class Inline(yaml.SafeDumper):
    """Writes what occurs twice twice: anchors are not read."""

    def ignore_aliases(self, _data: Any) -> bool:
        return True


class Blocks(Inline):
    """Sections as blocks, lists on their key's line."""


def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    """In double quotes, with escapes, if there is anything in it that cannot be printed."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if value.isprintable() else '"')


Inline.add_representer(str, text)
Blocks.add_representer(str, text)
Blocks.add_representer(list, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, True))
