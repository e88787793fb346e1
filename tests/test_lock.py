"""One training in a folder: another is refused by name, and a killed one holds nothing."""

from __future__ import annotations

import os

import pytest

from stepdistill import lock
from stepdistill.errors import UserError


def test_a_second_one_is_refused_by_the_name_of_the_first(tmp_path):
    with lock.held(tmp_path):
        for _ in range(2):
            with pytest.raises(UserError, match=f"trained in by process {os.getpid()} on "), lock.held(tmp_path):
                pass
    assert list(tmp_path.iterdir()) == []


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


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(UserError, match="cannot be written"), lock.held(tmp_path / "run"):
        pass
