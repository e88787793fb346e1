"""One training in a run's folder at a time; the system frees the lock of a process that is killed."""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from . import distributed
from .errors import UserError

LOCK = ".lock"  # in the folder: who trains there


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Nobody else trains in this folder meanwhile. It is made if need be, and removed again if nothing came into it.

    The first process takes the lock for all that train together.

    Raises:
        UserError: another training holds it, or the folder cannot be written.
    """
    from filelock import FileLock

    lock = FileLock(folder / LOCK)
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    distributed.at_first(lambda: take(lock, folder))
    try:
        yield
    finally:
        if distributed.rank() == 0:
            with suppress(OSError):
                (folder / LOCK).unlink()  # while it is held: who had opened it meanwhile sees that its name is gone
            lock.release()
            with suppress(OSError):  # something came into it
                for place in made:
                    place.rmdir()


def take(lock, folder: Path) -> None:
    """Take a lock of filelock's, or refuse, as `held` says."""
    from filelock import Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        tempfile.TemporaryFile(dir=folder).close()  # a lock left behind may be opened where nothing new can be written
        (folder / LOCK).write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
    except Timeout:
        raise UserError(
            f"{folder} is being trained in by {holder(folder)}; wait for its end, stop it there (kill PID: it saves first), "
            f"or give another folder with --output"
        ) from None
    except OSError as error:
        lock.release()
        why = os.strerror(error.errno) if error.errno else error
        raise UserError(f"{folder} cannot be written ({why}); give another folder with --output") from None


def holder(folder: Path) -> str:
    """Who holds the lock of a folder, in words."""
    try:
        told = json.loads((folder / LOCK).read_text())
        return f"process {int(told['pid'])} on {str(told['host'])[:64]}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
