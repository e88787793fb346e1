"""How files come to be: written beside, synced, and renamed. Whoever reads finds the old one or the new one, never a half."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

STALE = 3600.0  # seconds after which an unfinished file is nobody's
REMEDIES = {  # of errors that disks, rights and names make
    errno.ENOSPC: "make room on that disk, or name a folder on another",
    errno.EDQUOT: "your quota is used up; make room, or name a folder on another disk",
    errno.EFBIG: "files may not be as large there; raise the limit (ulimit -f), or name a folder on another disk",
    errno.EROFS: "name a folder that can be written",
    errno.EACCES: "see who may read and write it (ls -ld), or name another folder",
    errno.EPERM: "see who may read and write it (ls -ld), or name another folder",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ENOENT: "see that it is there, and try again",
    errno.EISDIR: "it is a folder; name a file",
    errno.ENOTDIR: "a file stands where a folder must be; name another",
    errno.EEXIST: "it is there already; name another",
    errno.ELOOP: "it is a link that leads to itself; name another",
    errno.EIO: "the disk or its connection fails; look at it, or name a folder on another",
}


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A file to write, in the folder of `path`, which takes that name at the end of the block; if it fails, it is removed.

    Raises:
        OSError: of the disk, with the name of the file, also where safetensors met it.
    """
    tmp = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with naming(path):
            yield tmp
            put(tmp, path)
    finally:
        with suppress(OSError):
            tmp.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the disk get the name of what was written, which those of a full one lack, and one type."""
    try:
        yield
    except SafetensorError as error:
        if number := number_of(error):
            raise OSError(number, os.strerror(number), str(path)) from None
        raise
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a whole text file, in UTF-8."""
    with beside(path) as tmp:
        tmp.write_text(text, encoding="utf-8")


def put(tmp: Path, path: Path) -> None:
    """Let a written file take its name once it is on the disk."""
    sync(tmp)
    tmp.replace(path)
    sync(path.parent)


def swap(tmp: Path, path: Path) -> None:
    """Let a written folder take the place of an older one, which is there until then, and which `recover` puts back.

    What is in `tmp` is synced already.
    """
    old = path.with_name(f".{path.name}.old")
    recover(path)
    sync(tmp)
    if path.exists():
        path.rename(old)
    tmp.rename(path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(path: Path) -> None:
    """Bring to an end what was interrupted in `swap`: the older folder is put back, or removed if the new one is there."""
    old = path.with_name(f".{path.name}.old")
    if old.exists() and not path.exists():
        old.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file, or the list of what is in a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def set_aside(path: Path, word: str) -> Path:
    """Rename a file or folder to NAME.WORD-1, or the next number that is free; returns its new place."""
    n = next(n for n in range(1, 10_000) if not path.with_name(f"{path.name}.{word}-{n}").exists())
    return path.rename(path.with_name(f"{path.name}.{word}-{n}"))


def sweep(folder: Path) -> None:
    """Remove what killed processes left unfinished in a folder, at any depth; younger files may be somebody's."""
    for left in folder.rglob(".*.tmp"):
        with suppress(OSError):  # somebody has just finished it
            if abs(time.time() - left.stat().st_mtime) > STALE:  # also where the clock was set back
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def number_of(error: BaseException) -> int | None:
    """The number of the system's error, also from the words of safetensors; None: it is of another kind."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error)) if isinstance(error, SafetensorError) else None
    return int(found[1]) if found else None


def told(error: Exception) -> str | None:
    """An error of a disk, of the rights on it, or of a name, in one line with a remedy; None: it is another kind of error."""
    if (number := number_of(error)) not in REMEDIES:
        return None
    name = getattr(error, "filename", None)
    return f"{name}: " * bool(name) + f"{os.strerror(number)}; {REMEDIES[number]}"


def free(folder: Path) -> int:
    """Bytes that are free on the disk of a folder, which need not be there yet."""
    place = folder.absolute()
    return shutil.disk_usage(next(one for one in (place, *place.parents) if one.exists())).free


def giga(size: float) -> str:
    """A number of bytes in words."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
