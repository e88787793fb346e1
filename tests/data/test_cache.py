"""The cache of encodings: what is read is what was encoded, once, by whatever made it and nothing else."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import signal
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from counting import Family, check_interrupted, line, opened
from students import student

from stepdistill.data import build_batches, cache, pictures, texts
from stepdistill.data.build import makers
from stepdistill.data.cache import Cache, Column, fill
from stepdistill.data.prompts import read_prompts
from stepdistill.data.texts import encode_texts, store_texts
from stepdistill.errors import UserError
from stepdistill.show import Line


def entries(keys):
    return {key: {"x": torch.full((2,), float(len(key)))} for key in keys}


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(cache, "ENTRIES", 4)


def test_entries_are_found_again_under_the_same_settings_alone(tmp_path):
    store = opened(tmp_path, model="a", size=[1, 2])
    fill(store, ["k", "kk", "kkk", "k"], entries, 2, "things", line())
    column = Column(opened(tmp_path, model="a", size=[1, 2]), ["kk", "k", "kkk"], "x")
    assert torch.equal(column[torch.tensor([2, 0])], torch.tensor([[3.0, 3], [2, 2]]))
    assert column.store.shape("k", "x") == (2,) and column.store.names("k") == ["x"]
    for other in ({"model": "b", "size": [1, 2]}, {"model": "a", "size": [2, 1]}, {"model": "a", "size": [1, 2], "more": None}):
        assert "k" not in opened(tmp_path, **other)
    assert "k" not in opened(tmp_path, "pictures", model="a", size=[1, 2])
    assert json.loads((store.folder / "made.json").read_text()) == {"model": "a", "size": [1, 2]}


def test_a_damaged_file_is_told_and_its_entries_made_again(tmp_path):
    keys = [f"{i:02d}" for i in range(10)]
    fill(opened(tmp_path), keys, entries, 2, "things", line())
    files = sorted(next(tmp_path.iterdir()).glob("*.safetensors"))
    assert len(files) == 3
    files[1].write_bytes(files[1].read_bytes()[:-1])
    said, made = io.StringIO(), []
    store = Cache(tmp_path, "texts", {}, Line(said))
    assert f"{files[1]} was damaged" in said.getvalue() and not files[1].exists()
    fill(store, keys, lambda some: made.extend(some) or entries(some), 2, "things", line())
    assert 2 <= len(made) <= 4 and all(key in store for key in keys)


def test_too_small_a_disk_is_refused_with_the_number_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: types.SimpleNamespace(free=799))
    with pytest.raises(UserError, match=r"needs 0\.0 MB more, but only 0\.0 MB of its disk are free; set data\.cache"):
        fill(opened(tmp_path), [f"{i:03d}" for i in range(100)], entries, 2, "things", line())  # 8 bytes each
    assert not list(tmp_path.rglob("*.safetensors"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: types.SimpleNamespace(free=800))
    fill(opened(tmp_path), [f"{i:03d}" for i in range(100)], entries, 2, "things", line())


def test_two_processes_share_the_work_and_see_each_other_s_entries(tmp_path, monkeypatch):
    keys, barrier, here = [f"{i:02d}" for i in range(11)], threading.Barrier(2, timeout=20), threading.local()
    monkeypatch.setattr(cache.distributed, "rank", lambda: here.rank)
    monkeypatch.setattr(cache.distributed, "world", lambda: 2)
    monkeypatch.setattr(cache.distributed, "wait", barrier.wait)
    monkeypatch.setattr(cache, "opened", cache.opened.__wrapped__)  # a handle of each thread's own

    def process(rank):
        here.rank, made = rank, []
        store = opened(tmp_path)
        fill(store, keys * 2, lambda some: made.extend(some) or entries(some), 3, "things", line())
        return made, [key in store for key in keys]

    with ThreadPoolExecutor(2) as pool:
        (one, seen), (two, theirs) = pool.map(process, range(2))
    assert sorted(one + two) == keys and abs(len(one) - len(two)) == 1
    assert all(seen) and all(theirs)


def test_unfinished_files_are_no_entries_and_go_when_they_are_old(tmp_path):
    folder = opened(tmp_path).folder
    young, old = folder / ".a.safetensors.1.tmp", folder / ".b.safetensors.2.tmp"
    for file in (young, old):
        file.write_bytes(b"half")
    os.utime(old, (0, 0))
    assert not opened(tmp_path).files and young.exists() and not old.exists()


def changes(made, tmp_path):
    """(what is changed, its recipe): each must have encodings of its own."""
    model, recipe = made.recipe.model, made.recipe
    for key, value in {"dtype": "bfloat16", "revision": "abc", "variant": "fp16"}.items():
        yield key, dataclasses.replace(recipe, model=dataclasses.replace(model, **{key: value}))
    other = shutil.copytree(model.source, tmp_path / "other")
    yield "source", dataclasses.replace(recipe, model=dataclasses.replace(model, source=str(other)))


def test_a_changed_model_has_other_encodings(tmp_path):
    made = student(tmp_path)
    before = makers(made.recipe, made.family)
    assert makers(made.recipe, made.family) == before
    for what, recipe in changes(made, tmp_path):
        assert makers(recipe, made.family) != before, what
    weights = next(Path(made.recipe.model.source).rglob("text_encoder/*.safetensors"))
    os.utime(weights, ns=(0, 0))  # the same bytes, written anew
    assert makers(made.recipe, made.family) != before


def test_a_changed_prompt_or_picture_or_size_is_encoded_anew_and_nothing_else(tmp_path):
    made = student(tmp_path)
    family, folder = made.family, tmp_path / "cache"
    counted = count(family)
    recipe = dataclasses.replace(made.recipe, data=dataclasses.replace(made.recipe.data, count=6))
    build_batches(recipe, family, cache=folder)
    assert counted == {"texts": 7, "pictures": 6}  # six captions, and none
    build_batches(recipe, family, cache=folder)
    assert counted == {"texts": 7, "pictures": 6}
    build_batches(dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, count=8)), family, cache=folder)
    assert counted == {"texts": 9, "pictures": 8}
    family.size = (32, 16)
    build_batches(recipe, family, cache=folder)
    assert counted == {"texts": 9, "pictures": 14}
    os.utime(next(Path(recipe.model.source).rglob("vae/*.safetensors")), ns=(0, 0))  # another autoencoder
    build_batches(recipe, family, cache=folder)
    assert counted == {"texts": 16, "pictures": 20}


def count(family):
    """From now on, how many prompts and pictures a family encodes."""
    counted, told, drawn = {"texts": 0, "pictures": 0}, family.encode_prompts, family.encode

    def encode_prompts(prompts):
        counted["texts"] += len(prompts)
        return told(prompts)

    def encode(images):
        counted["pictures"] += len(images)
        return drawn(images)

    family.encode_prompts, family.encode = encode_prompts, encode
    return counted


@pytest.mark.parametrize("teacher", ["eps", "flow", "sdxl"])
def test_a_cached_batch_is_the_uncached_one_bit_for_bit(tmp_path, teacher):
    made = student(tmp_path, teacher, "data.count=10", "train.batch=4")
    plain = build_batches(made.recipe, made.family)
    build_batches(made.recipe, made.family, cache=tmp_path / "cache")
    cached = build_batches(made.recipe, made.family, cache=tmp_path / "cache")
    for step in range(4):
        ours, theirs = cached(step, 0)[0], plain(step, 0)[0]
        assert torch.equal(ours.noise, theirs.noise) and torch.equal(ours.x0, theirs.x0) and ours.prompts == theirs.prompts
        for a, b in ((ours.cond, theirs.cond), (ours.null, theirs.null)):
            assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_interrupted_at_three_places_nothing_is_lost_or_done_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "ENTRIES", 20)  # so that some wait at every stop
    monkeypatch.setattr(texts, "CHUNK", 8)
    monkeypatch.setattr(pictures, "MOST", 8)
    check_interrupted(tmp_path, 300, 60, (20, 12, 9), Family)


def test_a_killed_process_loses_no_file_that_it_had_written(tmp_path):
    prompts = read_prompts("stepdistill/prompts", 300)
    if not (child := os.fork()):
        family = Family()
        family.interrupt = lambda calls: os.kill(os.getpid(), signal.SIGKILL) if calls > 128 else None
        store_texts(family, prompts, opened(tmp_path), torch.float32, line())
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    family = Family()
    cond, _ = store_texts(family, prompts, opened(tmp_path), torch.float32, line())
    assert family.asked == prompts[128:]
    rows = torch.arange(300)
    assert torch.equal(cond["text"][rows], encode_texts(Family(), prompts)["text"])


@pytest.mark.parametrize("jump", [4e7, -4e7])
def test_a_run_whose_clock_jumps_takes_nothing_from_another_that_writes(tmp_path, monkeypatch, jump):
    store, honest, times = opened(tmp_path), cache.save_file, []

    def save(tensors, path):
        honest(tensors, path)
        if not times:
            there = time.time() + jump
            with monkeypatch.context() as clock:
                clock.setattr(time, "time", lambda: there)
                opened(tmp_path)
        times.append(path)

    monkeypatch.setattr(cache, "save_file", save)
    fill(store, ["k", "kk"], entries, 2, "things", line())
    assert all(key in opened(tmp_path) for key in ("k", "kk"))
    assert len(times) == 2  # the other took it for abandoned, and it was written again
    assert not list(tmp_path.rglob("*.tmp"))
