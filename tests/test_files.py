"""Files are there whole or not at all; what a disk refuses is told in a line."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from stepdistill import files


def test_a_file_that_fails_leaves_the_old_one_and_nothing_beside(tmp_path):
    path = tmp_path / "told.json"
    files.write_text(path, "old")
    with pytest.raises(ValueError, match="half"), files.beside(path) as tmp:
        tmp.write_text("ne")
        raise ValueError("half")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    files.write_text(path, "né")
    assert path.read_bytes() == "né".encode() and list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    honest_sync, honest_replace = os.fsync, os.replace

    def fsync(handle):
        done.append(("sync", os.readlink(f"/proc/self/fd/{handle}")))
        honest_sync(handle)

    def replace(old, new):
        done.append(("name", str(new)))
        honest_replace(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    files.write_text(tmp_path / "a", "text")
    (first, tmp), *rest = done
    assert first == "sync" and tmp.startswith(str(tmp_path / ".a."))
    assert rest == [("name", str(tmp_path / "a")), ("sync", str(tmp_path))]


@pytest.mark.parametrize("interrupted", ["before", "between", "after"])
def test_an_interrupted_swap_is_brought_to_an_end(tmp_path, interrupted):
    path, old, tmp = (tmp_path / name for name in ("export", ".export.old", ".export.tmp"))
    tmp.mkdir()
    (tmp / "a").write_text("new")
    for place, there in ((path, interrupted == "before"), (old, interrupted != "before")):
        if there:
            place.mkdir()
            (place / "a").write_text("old")
    if interrupted == "after":
        tmp.rename(path)
    files.recover(path)
    assert (path / "a").read_text() == ("new" if interrupted == "after" else "old") and not old.exists()
    if interrupted != "after":
        files.swap(tmp, path)
        assert (path / "a").read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["export"]


def test_only_old_leftovers_are_swept(tmp_path):
    young, old, future, kept = (tmp_path / name for name in (".a.tmp", "eval/.b.tmp", ".c.tmp", "d.tmp"))
    (tmp_path / "eval").mkdir()
    for file, age in ((young, 0), (old, 2 * files.STALE), (future, -2 * files.STALE), (kept, 2 * files.STALE)):
        file.write_text("half")
        os.utime(file, (time.time() - age,) * 2)
    files.sweep(tmp_path)
    assert young.exists() and kept.exists() and not old.exists() and not future.exists()


def test_between_the_renames_of_a_swap_the_old_folder_is_not_lost(tmp_path, monkeypatch):
    new, path = tmp_path / "new", tmp_path / "path"
    for folder in (new, path):
        folder.mkdir()
        (folder / "says").write_text(folder.name)
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda me, to: rename(me, to) if me == path else pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        files.swap(new, path)
    monkeypatch.undo()
    files.recover(path)
    assert (path / "says").read_text() == "path"


def test_what_is_set_aside_never_takes_a_place(tmp_path):
    for n in (1, 2):
        (tmp_path / "run").write_text(str(n))
        assert files.set_aside(tmp_path / "run", "old").name == f"run.old-{n}"
    assert (tmp_path / "run.old-1").read_text() == "1"


def test_other_errors_are_not_the_disks():
    assert files.told(OSError(errno.ENOMEM, "no memory", "a")) is None
    assert files.told(ValueError("os error 28")) is None
    assert "quota" in files.told(OSError(errno.EDQUOT, "quota exceeded"))
