"""A checkpoint is whole or not used, whenever its writing was cut short, and whatever happened to it since."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
from collections import namedtuple

import pytest
import torch
from killing import die_within

from stepdistill import checkpoint, distributed, files
from stepdistill.errors import UserError


def tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        "roles/student/a": torch.randn(7, 3, generator=generator),
        "optimizers/student/a/step": torch.tensor(float(seed)),
        "half": torch.randn(5, generator=generator).bfloat16(),
        "count": torch.tensor([seed]),
        "turned": torch.randn(4, 6, generator=generator).t(),
    }


def save(folder, step, keep=2, seed=None, **meta):
    return checkpoint.save(folder, step, tensors(step if seed is None else seed), {"stage": 0, **meta}, keep, limit=100)


def holds(path, seed):
    found, _ = checkpoint.load(path)
    wanted = tensors(seed)
    return found.keys() == wanted.keys() and all(
        torch.equal(found[name], x) and found[name].dtype == x.dtype for name, x in wanted.items()
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_loaded_bit_for_bit_from_files_of_limited_size(tmp_path):
    path = save(tmp_path, 3, watch={"a": [1.5]})
    assert checkpoint.damage(path) is None and holds(path, 3)
    assert checkpoint.load(path)[1] == {"step": 3, "stage": 0, "watch": {"a": [1.5]}}
    parts = [name for name in names(path) if name.endswith("safetensors")]
    assert parts == ["state-0001.safetensors", "state-0002.safetensors", "state-0003.safetensors"]
    checked = subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=path, capture_output=True)
    assert checked.returncode == 0 and checked.stdout.count(b"OK") == len(parts) + 1


def test_no_more_than_the_limit_is_held(monkeypatch):
    """Or one tensor that is larger."""
    all_of_it = {f"{k}": torch.zeros(n) for k, n in enumerate((10, 10, 10, 50, 1, 24, 1))}
    sizes = [sum(x.nbytes for x in part.values()) for part in checkpoint.parts(all_of_it, 100)]
    assert sizes == [80, 40, 200, 100, 4]
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    assert [list(part) for part in checkpoint.parts(all_of_it, 100)] == [[]] * 5  # as many, of nothing


def test_the_newest_stay_and_the_best(tmp_path):
    scores = {1: 5.0, 2: 2.0, 3: None, 4: 3.0, 5: float("nan"), 6: 2.0, 7: None, 8: None}
    there = []
    for step, score in scores.items():
        save(tmp_path, step, keep=2, score=score)
        there.append(checkpoint.steps(tmp_path))
    assert there == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [5, 6], [6, 7], [6, 7, 8]]


SPOILT = {
    "one bit": ("state-0002.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
    "short": ("state-0002.safetensors", lambda data: data[:-1]),
    "empty": ("state-0001.safetensors", lambda data: b""),
    "missing": ("state-0003.safetensors", None),
    "one digit": ("state.json", lambda data: data.replace(b"2", b"3")),
    "no JSON": ("state.json", lambda data: b"{" * 100_000),
    "no state": ("state.json", None),
    "no sums": ("SHA256SUMS", None),
    "no list": ("SHA256SUMS", lambda data: b""),
    "half a list": ("SHA256SUMS", lambda data: data[:-20]),
    "another's sums": ("SHA256SUMS", lambda data: b"0" * 64 + data[64:]),
    "no text": ("SHA256SUMS", lambda data: bytes(range(256))),
    "sums of elsewhere": ("SHA256SUMS", lambda data: data + b"0" * 64 + b"  ../../secret\n"),
}


def test_the_one_just_written_stays_whatever_is_there(tmp_path):
    save(tmp_path, 7)
    save(tmp_path, 3, keep=1)
    assert names(tmp_path) == ["000003", "000007"]


def spoil(path, how):
    name, change = SPOILT[how]
    if change is None:
        (path / name).unlink()
    else:
        (path / name).write_bytes(change((path / name).read_bytes()))


@pytest.mark.parametrize("how", SPOILT)
def test_a_damaged_one_is_named_and_the_one_before_it_taken(tmp_path, how):
    save(tmp_path, 1)
    spoil(save(tmp_path, 2), how)
    said = []
    newest = checkpoint.newest(tmp_path, said.append)
    assert newest == tmp_path / "000001" and holds(newest, 1)
    assert len(said) == 1 and "000002 is damaged" in said[0]
    with pytest.raises(UserError, match="000002 is damaged"):
        checkpoint.check(tmp_path / "000002")
    assert checkpoint.check(newest) == newest


def test_where_none_is_whole_nothing_is_removed(tmp_path):
    for step in (1, 2):
        spoil(save(tmp_path, step), "short")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.*")}
    with pytest.raises(UserError, match=r"no checkpoint is whole.*000002.*000001.*nothing was removed"):
        checkpoint.newest(tmp_path)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.*")} == before
    assert checkpoint.newest(tmp_path / "elsewhere") is None


def test_one_of_an_older_version_is_told_as_such(tmp_path):
    (tmp_path / "000004").mkdir()
    for name in ("state.safetensors", "state.json"):
        (tmp_path / "000004" / name).write_text("{}")
    with pytest.raises(UserError, match="an older version of stepdistill wrote it"):
        checkpoint.newest(tmp_path)


def test_what_training_does_not_go_on_from_is_set_aside_and_never_counted(tmp_path):
    folder = tmp_path / "checkpoints"
    for step in (1, 2, 3, 4):
        save(folder, step, keep=9, score=float(step))
    spoil(folder / "000001", "one bit")
    assert [path.name for path in checkpoint.set_aside(folder, folder / "000003")] == ["000001.unused-1", "000004.unused-1"]
    save(folder, 4, keep=3)
    assert checkpoint.steps(folder) == [2, 3, 4]
    elsewhere = save(tmp_path / "other", 9)
    assert [path.name for path in checkpoint.set_aside(folder, elsewhere)] == [
        f"00000{k}.unused-{1 + k // 4}" for k in (2, 3, 4)
    ]


TRACED = (checkpoint.__file__, files.__file__, shutil.__file__)


def killed_at(moment, action):
    """In a process that dies before it executes so many more lines of what writes; whether it did."""
    if (child := os.fork()) == 0:
        die_within(moment, TRACED)
        action()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL


@pytest.mark.parametrize(("step", "every"), [(3, 31), (2, 29)])
def test_killed_at_some_lines_of_saving_a_whole_one_is_there(tmp_path, step, every):
    """Saving a new one, which removes the oldest, and one of a step that is there already."""
    before = tmp_path / "before"
    for old in (1, 2):
        save(before, old)
    moment, survived, found = 0, True, set()
    while survived:
        folder = shutil.copytree(before, tmp_path / "checkpoints")
        survived = killed_at(moment, lambda folder=folder: save(folder, step, seed=9))
        checkpoint.tidy(folder)
        newest = checkpoint.newest(folder, pytest.fail)
        found.add(newest.name)
        assert holds(newest, 9 if int(newest.name) == 3 else 2) or (step == 2 and holds(newest, 9))
        assert all(name.isdecimal() for name in names(folder)) and len(names(folder)) >= 2
        save(folder, 4)
        assert checkpoint.steps(folder) == [int(newest.name), 4]
        shutil.rmtree(folder)
        moment += every
    print(f"killed at {moment // every} lines")
    assert moment > 300 and found == ({"000002", "000003"} if step == 3 else {"000002"})


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced, named = set(), []
    sync, rename = files.sync, type(tmp_path).rename
    monkeypatch.setattr(files, "sync", lambda path: (synced.add(path), sync(path)))
    monkeypatch.setattr(type(tmp_path), "rename", lambda self, to: (named.append((self, set(synced))), rename(self, to))[1])
    path = save(tmp_path, 1)
    (tmp, before), *_ = named
    assert before == {tmp, *(tmp / name for name in names(path))} and tmp_path in synced


def test_one_that_a_training_removes_while_it_is_read_is_not_damaged(tmp_path, monkeypatch):
    save(tmp_path, 1, keep=1)
    honest = checkpoint.damage

    def damage(path):
        if path.name == "000001":
            save(tmp_path, 2, keep=1)
        return honest(path)

    monkeypatch.setattr(checkpoint, "damage", damage)
    assert checkpoint.newest(tmp_path, pytest.fail) == tmp_path / "000002"


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("when", ["before", "in a tensor file", "in safetensors", "in the JSON", "while syncing"])
def test_a_full_disk_leaves_the_last_one_whole_and_says_what_is_needed(tmp_path, monkeypatch, when):
    save(tmp_path, 1)

    def refuse(*_args, **_named):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuse_as_safetensors(*_args):
        raise checkpoint.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        if when == "before":
            patch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 100))
        elif when == "in the JSON":
            patch.setattr(type(tmp_path), "write_text", refuse)
        elif when == "while syncing":
            patch.setattr(os, "fsync", refuse)
        else:
            patch.setattr(checkpoint, "save_file", refuse if "tensor file" in when else refuse_as_safetensors)
        with pytest.raises(
            UserError, match=r"No space left on device\).*needs 0\.0 MB, and .* free; the last one is whole"
        ) as caught:
            save(tmp_path, 2)
    assert str(tmp_path / "000001") in str(caught.value) and names(tmp_path) == ["000001"]
    assert checkpoint.newest(tmp_path) == tmp_path / "000001"
    save(tmp_path, 2)
    assert names(tmp_path) == ["000001", "000002"]


def test_space_for_the_checkpoints_to_come_is_looked_at_first(tmp_path, monkeypatch):
    said, free = [], 250
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1000, 0, free))
    checkpoint.check_space(tmp_path / "run" / "checkpoints", 80, 2, said.append)
    assert not said
    checkpoint.check_space(tmp_path / "run" / "checkpoints", 100, 2, said.append)
    assert len(said) == 1 and "lower train.keep (now 2)" in said[0]
    (tmp_path / "checkpoints" / "000001").mkdir(parents=True)
    (tmp_path / "checkpoints" / "000001" / "state-0001.safetensors").write_bytes(bytes(50))
    checkpoint.check_space(tmp_path / "checkpoints", 100, 2, said.append)
    assert len(said) == 1  # what the old ones take is theirs
    with pytest.raises(UserError, match="make room"):
        checkpoint.check_space(tmp_path, 251, 2, said.append)


def test_scores_that_cannot_be_read_are_none(tmp_path):
    path = save(tmp_path, 1, score=1)
    assert checkpoint.score_of(path) == 1
    for text in ("[]", "{", json.dumps({"score": "low"}), json.dumps({"score": None})):
        (path / "state.json").write_text(text)
        assert checkpoint.score_of(path) is None


@pytest.mark.long
@pytest.mark.parametrize("step", [3, 2])
def test_killed_at_any_line_of_saving_a_whole_one_is_there(tmp_path, step):
    test_killed_at_some_lines_of_saving_a_whole_one_is_there(tmp_path, step, 1)
