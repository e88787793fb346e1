"""One training in a folder: another is refused by name, and a killed one holds nothing."""

from __future__ import annotations

import os
import signal
import socket
import time

import pytest
from processes import start, world

from stepdistill import distributed, lock
from stepdistill.errors import UserError


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


def test_a_folder_made_for_nothing_is_removed_again(tmp_path):
    with pytest.raises(ValueError, match="refused"), lock.held(tmp_path / "runs" / "a"):
        raise ValueError("refused")
    assert list(tmp_path.iterdir()) == []
    with lock.held(tmp_path / "runs" / "a"):
        (tmp_path / "runs" / "a" / "log").touch()
    assert [path.name for path in (tmp_path / "runs" / "a").iterdir()] == ["log"]


@pytest.mark.parametrize("garbled", ["", "[1]", '{"pid": 1}', '{"pid": "x", "host": "y"}', "\udcff"])
def test_a_holder_who_left_no_word_is_another_process(tmp_path, garbled):
    (tmp_path / lock.LOCK).write_bytes(garbled.encode("utf-8", "surrogateescape"))
    assert lock.holder(tmp_path) == "another process"


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
def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:  # others may not enter pytest's
        place = type(tmp_path)(folder) / "run"
        place.mkdir()
        process = start(as_nobody, place)
        process.join()
        assert process.exitcode == 0


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(UserError, match="cannot be written"), lock.held(tmp_path / "run"):
        pass


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
