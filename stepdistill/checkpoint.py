"""Named tensors and a small JSON, saved as one folder that is either whole or not used:
checkpoints/000100/state-0001.safetensors, ..., state.json, and SHA256SUMS of them all, written last (sha256sum -c checks it).
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import distributed, files
from .errors import UserError
from .files import giga
from .foreign import read_json

SUMS, META = "SHA256SUMS", "state.json"
LIMIT = 4 * 2**30  # bytes of one file: so much memory is needed besides the training itself


def save(
    folder: Path, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], keep: int, limit: int = LIMIT
) -> Path:
    """Write folder/<step>, then remove all but the newest `keep` and the best: of the least meta["score"], if any has one.

    All processes call it, and walk the same names; the first one writes. No more than `limit` bytes, or one tensor, are held
    in memory at a time.

    Raises:
        UserError: it cannot be written, on any process; the unfinished one is removed, and the others are as they were.
    """
    done, tmp = folder / f"{step:06d}", folder / f".{step:06d}.tmp"
    needed, main, failed = size(tensors), distributed.rank() == 0, None
    try:
        if main:
            begin(tmp, needed)
    except OSError as error:
        failed = error
    for number, part in enumerate(parts(tensors, limit), 1):  # the others take part in every gathering, also of what fails
        try:
            if main and failed is None:
                file = tmp / f"state-{number:04d}.safetensors"
                with files.naming(file):
                    save_file({name: x.contiguous() for name, x in part.items()}, file)
        except OSError as error:
            failed = error
    try:
        if main and failed is None:
            seal(tmp, {"step": step, **meta})
            files.swap(tmp, done)
            rotate(folder, keep, done)
    except OSError as error:
        failed = error
    if main and failed is not None:
        shutil.rmtree(tmp, ignore_errors=True)
    if failed := distributed.told(failed and refusal(failed, folder, needed)):
        raise failed
    return done


def begin(tmp: Path, needed: int) -> None:
    """Make the folder of an unfinished checkpoint, if there is room for it."""
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    if files.free(tmp) < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp))


def parts(tensors: Mapping[str, Tensor], limit: int) -> Iterator[dict[str, Tensor]]:
    """Whole tensors on the CPU, by name, as many at a time as have `limit` bytes; kept by the first process alone."""
    part, held = {}, 0
    for name, x in tensors.items():
        if held and held + bytes_of(x) > limit:
            yield part
            part, held = {}, 0
        full = distributed.whole(x.detach())
        if distributed.rank() == 0:
            part[name] = full.cpu()
        held += bytes_of(x)
    yield part


def seal(tmp: Path, meta: Mapping[str, Any]) -> None:
    """Write the JSON and the checksums, and wait until all is on the disk."""
    with files.naming(tmp / META):
        (tmp / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")
    sums = [f"{sha256(file)}  {file.name}\n" for file in sorted(tmp.iterdir())]
    with files.naming(tmp / SUMS):
        (tmp / SUMS).write_text("".join(sums), encoding="utf-8")
    for file in tmp.iterdir():
        files.sync(file)


def rotate(folder: Path, keep: int, newest: Path) -> None:
    """Remove all but the newest `keep`, the best, and the one just written."""
    there = steps(folder)
    scores = {step: score for step in there if (score := score_of(folder / f"{step:06d}")) is not None}
    stay = {*there[-keep:], int(newest.name), *([min(scores, key=lambda step: (scores[step], -step))] if scores else [])}
    for step in there:
        if step not in stay:
            gone = (folder / f"{step:06d}").rename(folder / f".{step:06d}.tmp")  # what is half removed is no checkpoint
            shutil.rmtree(gone, ignore_errors=True)


def refusal(error: OSError, folder: Path, needed: int) -> UserError:
    """A checkpoint that could not be written, in one line."""
    last = max(steps(folder), default=None)
    safe = f"the last one is whole, {folder / f'{last:06d}'}" if last is not None else "there is none before it"
    why, there = error.strerror or error, files.free(folder)
    return UserError(
        f"{folder}: no checkpoint could be written ({why}); one needs {giga(needed)}, and {giga(there)} are free; {safe}. "
        f"Make room there, or lower train.keep, and give the same command again: it goes on from there"
    )


def load(path: Path) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """The tensors, each read when it is asked for, and the JSON of a checkpoint that `newest` or `check` found whole."""
    return Saved(path), read_json(path / META)


class Saved(Mapping[str, Tensor]):
    """Tensors of several files by name; each is read when it is asked for, and held by nobody."""

    def __init__(self, path: Path):
        opened = [safe_open(path / name, "pt") for name in listed(path) if name != META]
        self.files = {name: file for file in opened for name in file.keys()}  # noqa: SIM118 - not a dictionary

    def __getitem__(self, name: str) -> Tensor:
        return self.files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def newest(folder: Path, say: Callable[[str], None] = print) -> Path | None:
    """The newest whole checkpoint; None: there is none at all. Every byte is read, so one process asks, and tells the others.

    Damaged ones that are newer are named through `say`.

    Raises:
        UserError: there are some, and none is whole.
    """
    bad = {}
    for step in reversed(steps(folder)):
        path = folder / f"{step:06d}"
        if (why := damage(path)) is None:
            for other, reason in bad.items():
                say(f"warning: {other} is damaged ({reason}) and is not used; {path} is whole, and taken instead")
            return path
        if not path.exists():  # a training that goes on has just removed it, after it wrote another
            return newest(folder, say)
        bad[path] = why
    if bad:
        named = "; ".join(f"{path.name}: {why}" for path, why in bad.items())
        raise UserError(
            f"{folder}: no checkpoint is whole ({named}); nothing was removed. Copy one back from where it is whole, name "
            f"another with --resume PATH, or start over with --resume never, which moves this run aside"
        )
    return None


def check(path: Path) -> Path:
    """A checkpoint that somebody named.

    Raises:
        UserError: it is damaged.
    """
    if why := damage(path):
        raise UserError(f"{path} is damaged ({why}); name another, or the run folder, whose newest whole one is taken")
    return path


def tidy(folder: Path) -> None:
    """Bring to an end what a killed process began here. Only who holds the run's lock may do this."""
    for left in folder.glob(".*.tmp"):
        shutil.rmtree(left, ignore_errors=True)
    for old in folder.glob(".*.old"):
        files.recover(folder / old.name[1:].removesuffix(".old"))


def set_aside(folder: Path, start: Path | None) -> list[Path]:
    """Rename what is no checkpoint of the training that begins at `start`, which is whole; returns the new names.

    It is what lies beyond that step, or is damaged, or all if the start lies elsewhere: none of it may ever be gone on from,
    or counted as one to keep. Only who holds the run's lock may do this.
    """
    at = step_of(start) if start is not None and start.parent.resolve() == folder.resolve() else -1
    there = {step: folder / f"{step:06d}" for step in steps(folder)}
    unused = [path for step, path in there.items() if step > at or (step < at and damage(path))]
    return [files.set_aside(path, "unused") for path in unused]


def is_one(path: Path) -> bool:
    """Whether a folder is, or was, a checkpoint, and not a run."""
    return path.is_dir() and (path.name.isdecimal() or (path / META).is_file() or (path / SUMS).is_file())


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint; None: every byte of it is as it was written."""
    try:
        for name, digest in listed(path).items():
            if sha256(path / name) != digest:
                return f"{name} is not what was written"
        read_json(path / META)["step"]
        Saved(path)
    except FileNotFoundError as error:
        name = Path(error.filename).name
        old = name == SUMS and (path / "state.safetensors").is_file()
        return "it has no checksums: an older version of stepdistill wrote it" if old else f"{name} is missing"
    except (ValueError, KeyError, TypeError) as error:  # UnicodeDecodeError is a ValueError
        return f"it cannot be read: {error}"
    except SafetensorError as error:
        return f"it cannot be read: {error}"
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}"
    return None


def listed(path: Path) -> dict[str, str]:
    """The files of a checkpoint, and their checksums.

    Raises:
        OSError, ValueError: that list is missing, or garbled.
    """
    lines = (path / SUMS).read_text(encoding="utf-8").splitlines()
    found = [re.fullmatch(r"([0-9a-f]{64})  (state\.json|state-\d+\.safetensors)", line) for line in lines]
    if None in found or META not in (wanted := {one[2]: one[1] for one in found}):
        raise ValueError(f"{SUMS} is garbled")
    return wanted


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in folder, oldest first; whether they are whole is not looked at."""
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal() and name == f"{int(name):06d}")


def step_of(path: Path) -> int:
    """The step of a checkpoint that is whole."""
    return read_json(path / META)["step"]


def score_of(path: Path) -> float | None:
    """The score of a checkpoint, the lower the better; None: it has none."""
    try:
        score = read_json(path / META).get("score")
    except (OSError, ValueError, AttributeError):
        return None
    return score if isinstance(score, int | float) and math.isfinite(score) else None


def check_space(folder: Path, needed: int, keep: int, say: Callable[[str], None]) -> None:
    """Say if the checkpoints to come, keep + 1 of `needed` bytes, will not fit on the disk.

    Raises:
        UserError: not even one will.
    """
    there = sum(file.stat().st_size for file in folder.rglob("*.safetensors")) if folder.is_dir() else 0
    free = files.free(folder)
    if free < needed:
        raise UserError(
            f"{folder}: a checkpoint needs {giga(needed)}, and {giga(free)} of its disk are free; make room, or name a "
            f"folder on a larger disk with --output"
        )
    if there + free < (keep + 1) * needed:
        say(
            f"warning: {folder} will need {giga((keep + 1) * needed)} for {keep} checkpoints and one being written, and "
            f"{giga(there + free)} are there or free; make room, or lower train.keep (now {keep})"
        )


def size(tensors: Mapping[str, Tensor]) -> int:
    return sum(map(bytes_of, tensors.values()))


def bytes_of(x: Tensor) -> int:
    """Of a tensor as it is whole, also if this process holds a share of it."""
    return x.numel() * x.element_size()


def sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
