"""Files, checkpoints and locks of several processes: with limits of the system, killed, of another user, together.

Apart from the tests of each, which `mutations.py` runs in forks, where no server of processes can be reached.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import socket
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from processes import start, world
from safetensors.numpy import save_file
from test_checkpoint import holds, names, tensors

from stepdistill import checkpoint, distributed, files, lock
from stepdistill.errors import UserError


def limited(folder):
    """In a process of its own: files may have 1000 bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    for write in (
        lambda tmp: tmp.write_bytes(bytes(5000)),
        lambda tmp: save_file({"x": np.zeros(5000)}, tmp),
    ):
        try:
            with files.beside(folder / "a") as tmp:
                write(tmp)
        except OSError as error:
            assert error.errno == errno.EFBIG and error.filename == str(folder / "a"), error
            assert files.told(error) == f"{folder / 'a'}: File too large; {files.REMEDIES[errno.EFBIG]}"
        else:
            return 1
    return 0 if not list(folder.iterdir()) else 2


def test_a_disk_that_takes_no_more_is_told_by_the_name_of_the_file(tmp_path):
    process = start(limited, tmp_path)
    process.join()
    assert process.exitcode == 0


def saved_within_a_limit(folder):
    """In a process of its own: files may have 100 bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    try:
        checkpoint.save(folder, 2, tensors(2), {}, 2)
    except UserError as error:
        return int("no checkpoint could be written (File too large)" not in str(error))
    return 2


def test_a_real_limit_of_the_system_is_told_too(tmp_path):
    checkpoint.save(tmp_path, 1, tensors(1), {}, 2)
    process = start(saved_within_a_limit, tmp_path)
    process.join()
    assert process.exitcode == 0 and names(tmp_path) == ["000001"] and holds(checkpoint.newest(tmp_path), 1)


def saved_by_two(folder, refused):
    if refused and distributed.rank() == 0:
        checkpoint.seal = lambda *_: (_ for _ in ()).throw(OSError(errno.EDQUOT, "Disk quota exceeded"))
    mine = {name: x + distributed.rank() for name, x in tensors(1).items()}
    try:
        checkpoint.save(folder, 1, mine, {"rank": distributed.rank()}, 2, limit=100)
    except UserError as error:
        return "quota" in str(error)
    return checkpoint.load(folder / "000001")[1]["rank"]


def test_the_first_process_writes_and_all_hear_if_it_cannot(tmp_path):
    assert world(2, saved_by_two, tmp_path / "a", True) == [True, True]
    assert names(tmp_path / "a") == []
    assert world(2, saved_by_two, tmp_path / "b", False) == [0, 0]
    assert holds(tmp_path / "b" / "000001", 1)


def hold(folder):
    with lock.held(folder):
        (folder / "held").touch()
        time.sleep(60)


def until(path):
    while not path.exists():
        time.sleep(0.01)


def test_a_second_training_is_refused_and_a_killed_one_is_not_waited_for(tmp_path):
    folder = tmp_path / "run"
    process = start(hold, folder)
    until(folder / "held")
    for _ in range(2):  # a refusal takes nothing from the holder
        with (
            pytest.raises(UserError, match=f"trained in by process {process.pid} on {socket.gethostname()}"),
            lock.held(folder),
        ):
            pass
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with lock.held(folder):
        assert lock.holder(folder) == f"process {os.getpid()} on {socket.gethostname()}"
    assert [path.name for path in folder.iterdir()] == ["held"]


def as_nobody(folder):
    os.chmod(folder, 0o555)
    (folder / ".lock").touch()
    os.chmod(folder / ".lock", 0o666)
    os.chmod(folder.parent, 0o755)
    os.setuid(65534)
    for place in (folder, folder / "new"):
        try:
            with lock.held(place):
                return 1
        except UserError as error:
            if "cannot be written (Permission denied); give another folder with --output" not in str(error):
                return 2
    return 0


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to become somebody who may not write")
def test_a_folder_that_cannot_be_written_is_refused():
    with tempfile.TemporaryDirectory() as folder:  # others may not enter pytest's
        place = Path(folder) / "run"
        place.mkdir()
        process = start(as_nobody, place)
        process.join()
        assert process.exitcode == 0


def both(folder):
    try:
        with lock.held(folder):
            distributed.wait()
            there = (folder / lock.LOCK).exists()
            distributed.wait()
            return there
    except UserError as error:
        return str(error)


def test_processes_that_train_together_hold_it_together(tmp_path):
    assert world(2, both, tmp_path / "free") == [True, True]
    with lock.held(tmp_path / "taken"):
        told = world(2, both, tmp_path / "taken")
    assert told[0] == told[1] and f"process {os.getpid()}" in told[0]
