"""Time and memory of one picture: what is counted, and when."""

import pytest
import torch
from processes import SERVER, start

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


def held(mib, queue):
    """Of a fresh process: what it had ever held before it held so many MiB more, meanwhile, and after it let go of them."""
    seen = [most_held()]
    block = torch.ones(mib, 2**18)  # rows of 1 MiB, each of which is written to
    seen.append(most_held())
    del block
    queue.put([*seen, most_held()])


def test_memory_is_the_most_that_was_ever_held():
    queue = SERVER.SimpleQueue()
    start(held, 400, queue).join(60)
    before, most, after = (value / 2**20 for value in queue.get())
    assert before > 50 and before + 300 < most < before + 500 and most <= after < most + 50
