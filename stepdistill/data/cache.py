"""Encodings by key, in memory or on disk: there a folder is named after all that decides what is in it, and its safetensors
files are each complete or absent. An entry is one prompt or picture: some named tensors.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .. import distributed
from ..errors import UserError
from ..files import beside, free, giga, sweep, write_text
from ..show import Line

ENTRIES, BYTES, SECONDS = 256, 2**28, 30.0  # a file is written at so many entries, so large, or after so long
Entry = dict[str, Tensor]
Answer = TypeVar("Answer")


def key_of(*parts: Any) -> str:
    """128 bits, in hexadecimals, that change with anything in parts (plain values)."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


class Memory:
    """Entries of this process alone, gone with it."""

    share = slice(None)  # of what is missing: this process encodes all of it

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}

    def __contains__(self, key: str) -> bool:
        return key in self.entries

    def names(self, key: str) -> list[str]:
        """Of an entry's tensors."""
        return list(self.entries[key])

    def read(self, key: str, name: str) -> Tensor:
        return self.entries[key][name]

    def shape(self, key: str, name: str) -> tuple[int, ...]:
        return tuple(self.entries[key][name].shape)

    def add(self, entries: dict[str, Entry]) -> None:
        self.entries |= entries

    def check_space(self, needed: int) -> None:
        """Nobody knows how much memory there will be."""

    def finish(self) -> None:
        """All is where it belongs."""


class Cache:
    """Entries in files of a folder, that of the settings with which they are made; read as they are needed. Several runs and
    processes may use it at once: each sees the others' entries at the next `finish`."""

    def __init__(self, root: Path, what: str, settings: dict[str, Any], line: Line):
        self.folder, self.line = root / f"{what}-{key_of(settings)[:16]}", line
        self.share = slice(distributed.rank(), None, distributed.world())
        self.waiting: dict[str, Entry] = {}
        self.files: dict[str, Path] = {}  # key -> where its entry is
        self.listed: set[Path] = set()
        self.began = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        if distributed.rank() == 0:
            sweep(self.folder)
            if not (self.folder / "made.json").is_file():
                write_text(self.folder / "made.json", json.dumps(settings, indent=1))
        self.list()

    def __contains__(self, key: str) -> bool:
        return key in self.files

    def names(self, key: str) -> list[str]:
        """Of an entry's tensors."""
        return sorted(name.split("/")[1] for name in self.ask(key, lambda file: file.keys()) if name.startswith(f"{key}/"))

    def read(self, key: str, name: str) -> Tensor:
        return self.ask(key, lambda file: file.get_tensor(f"{key}/{name}"))

    def shape(self, key: str, name: str) -> tuple[int, ...]:
        return self.ask(key, lambda file: tuple(file.get_slice(f"{key}/{name}").get_shape()))

    def ask(self, key: str, question: Callable[[Any], Answer]) -> Answer:
        """What the file of an entry answers.

        Raises:
            UserError: it is not there any more, or is not what it was.
        """
        path = self.files[key]
        try:
            return question(opened(path))
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path} has vanished or was changed after it was found ({error}); the same command encodes again what it held"
            ) from None

    def list(self) -> None:
        """Find the entries of files that came since the last time. A damaged file is removed, and that is told."""
        for path in sorted(set(self.folder.glob("*.safetensors")) - self.listed):
            try:
                with safe_open(path, "pt") as file:
                    self.files |= dict.fromkeys((name.split("/")[0] for name in file.keys()), path)  # noqa: SIM118
                self.listed.add(path)
            except (SafetensorError, OSError) as error:
                path.unlink(missing_ok=True)
                self.line.say(f"{path} was damaged ({error}) and is removed; what it held is encoded again")

    def add(self, entries: dict[str, Entry]) -> None:
        """Keep entries; they are on the disk at the latest after `finish`."""
        self.waiting |= entries
        if len(self.waiting) >= ENTRIES or bytes_of(self.waiting) >= BYTES or time.monotonic() - self.began > SECONDS:
            self.write()

    def write(self) -> None:
        """One file of all that waits: written beside, synced, and renamed."""
        if self.waiting:
            name, tensors = f"{key_of(*self.waiting)}.safetensors", {}
            for key, entry in self.waiting.items():
                tensors |= {f"{key}/{n}": x.contiguous() for n, x in entry.items()}
            try:
                self.put(name, tensors)
            except FileNotFoundError:  # a run whose clock had jumped ahead took it for abandoned
                self.put(name, tensors)
        self.waiting, self.began = {}, time.monotonic()

    def put(self, name: str, tensors: dict[str, Tensor]) -> None:
        with beside(self.folder / name) as tmp:
            save_file(tensors, tmp)

    def check_space(self, needed: int) -> None:
        """Raises UserError if so many bytes more do not fit on the disk."""
        if needed > (left := free(self.folder)):
            raise UserError(
                f"{self.folder} needs {giga(needed)} more, but only {giga(left)} of its disk are free; set data.cache to a "
                f"folder on a larger disk, or lower data.count"
            )

    def finish(self) -> None:
        """Write what waits, and see what other processes wrote."""
        self.write()
        self.list()


Store = Memory | Cache


@lru_cache(maxsize=128)
def opened(path: Path) -> Any:
    """A file of entries, mapped into memory; its name says what is in it, so it never changes."""
    return safe_open(path, "pt")


@dataclass(frozen=True)
class Column:
    """One tensor of every row [N, ...], read when its rows are asked for."""

    store: Store
    keys: Sequence[str]  # N, of the entries; equal rows share one
    name: str

    def __getitem__(self, rows: Tensor | Iterable[int]) -> Tensor:
        rows = rows.tolist() if isinstance(rows, Tensor) else rows
        return torch.stack([self.store.read(self.keys[i], self.name) for i in rows])


def fill(
    store: Store, keys: Sequence[str], encode: Callable[[list[str]], dict[str, Entry]], chunk: int, what: str, line: Line
) -> None:
    """Encode the entries that a store lacks, `chunk` at a time, each process its share of them.

    encode: keys -> their entries on the CPU; those that cannot be made are left out.

    Raises:
        UserError: they do not fit on the disk.
        KeyboardInterrupt: what was encoded is kept, and the next call goes on from there.
    """
    every = list(dict.fromkeys(keys))
    missing = [key for key in every if key not in store]
    distributed.wait()  # each looked before anybody wrote
    mine, checked = missing[store.share], False
    done = len(every) - len(missing)
    line.report(what, done, len(every))
    try:
        for i in range(0, len(mine), chunk):
            made = encode(mine[i : i + chunk])
            if made and not checked:
                store.check_space(bytes_of(made) * len(missing) // len(made))
                checked = True
            store.add(made)
            line.report(what, done + round(min(i + chunk, len(mine)) / len(mine) * len(missing)), len(every))
    except KeyboardInterrupt:
        store.finish()
        line.say(
            f"stopped with {sum(key in store for key in every)} of {len(every)} {what}; the same command goes on from there"
        )
        raise
    store.finish()
    distributed.wait()
    store.finish()


def bytes_of(entries: dict[str, Entry]) -> int:
    return sum(x.nbytes for entry in entries.values() for x in entry.values())


def disk(folder: Path) -> int:
    """Bytes that the encodings in a folder take."""
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
