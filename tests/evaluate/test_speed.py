"""Time and memory of one picture: what is counted, and when."""

import itertools

import pytest
import torch

from stepdistill.evaluate import speed as module
from stepdistill.evaluate.speed import most_held, speed


def run(monkeypatch, seconds):
    """Speed of calls that take so long, by a clock that only they move; and which calls there were."""
    now, calls = 0.0, []

    def draw(k):
        nonlocal now
        now += seconds(k)
        calls.append(k)

    monkeypatch.setattr(module.time, "perf_counter", lambda: now)
    return speed(draw, torch.device("cpu")), calls


def test_warm_calls_do_not_count_and_quartiles_are_of_the_others(monkeypatch):
    found, calls = run(monkeypatch, lambda k: 100.0 if k < 2 else (k - 1) / 1000)  # then 1 to 10 milliseconds
    assert calls == list(range(12))
    assert [found[name] for name in ("ms_low", "ms", "ms_high")] == pytest.approx([3.25, 5.5, 7.75])


def test_of_slow_pictures_three_are_enough(monkeypatch):
    found, calls = run(monkeypatch, lambda k: 1.0 + k)
    assert calls == [0, 1, 2, 3, 4] and found["ms"] == pytest.approx(4000)


def test_memory_is_the_most_that_was_ever_held():
    before = most_held()
    block = torch.ones(100, 2**20)  # 400 MiB
    assert most_held() >= before and before > 50 * 2**20
    assert most_held() > block.nbytes
    del block
    peaks = [most_held() for _ in range(2)]
    assert all(b >= a for a, b in itertools.pairwise(peaks)) and peaks[0] > 400 * 2**20
