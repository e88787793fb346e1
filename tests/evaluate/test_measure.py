"""The engine on samplers that need no network: blocks, shares of processes, interruptions, damage; figures of drawings."""

import numpy as np
import pytest

from stepdistill.errors import UserError
from stepdistill.evaluate import rows, tiny
from stepdistill.evaluate.measure import VARIED, Asked, Suite, collect, figures, make
from stepdistill.evaluate.meters import Colour, Shown, Variety, fidelity
from stepdistill.evaluate.presets import tiny_suite
from stepdistill.tiny.world import Scene, draw


def drawer(captions, first):
    """A perfect sampler: draws what captions say, its chance a function of the index."""
    seeds = range(90_000 + first, 90_000 + first + len(captions))
    return np.concatenate([draw([Scene.parse(text)], seed).images for text, seed in zip(captions, seeds, strict=True)])


def noise(captions, first):
    """Pictures 16 x 16 that depend on their index alone, brighter as it grows."""
    made = [np.random.default_rng(i).integers(0, 100 + i % 100, (16, 16, 3)) for i in range(first, first + len(captions))]
    return np.stack(made).astype(np.uint8)


def small(n=40, groups=3, each=4):
    """A suite of a few cheap meters."""
    plain = Asked([f"picture {i}" for i in range(n)], (Colour(), Shown(5)))
    varied = Asked([f"group {i // each}" for i in range(groups * each)], (Variety(each, None, lpips=False),), VARIED, each)
    return Suite("small", {"plain": plain, "varied": varied}, {"size": "16x16"})


@pytest.fixture(autouse=True)
def blocks_of_eight(monkeypatch):
    monkeypatch.setattr(rows, "BLOCK", 8)


def measured(sample, suite, folder):
    make(sample, suite, folder)
    return figures(suite, collect(suite, folder))


def test_blocks_cover_all_and_divide_no_group():
    assert rows.blocks(20) == [range(0, 8), range(8, 16), range(16, 20)]
    assert rows.blocks(18, 3) == [range(0, 6), range(6, 12), range(12, 18)]
    assert rows.blocks(40, 20) == [range(0, 20), range(20, 40)]


def test_figures_of_known_pictures(tmp_path):
    found = measured(noise, small(), tmp_path)
    pictures = noise([""] * 40, 0)
    luma = pictures / 255 @ np.array([0.299, 0.587, 0.114])
    assert found["brightness"] == pytest.approx(luma.mean(), rel=1e-5)
    assert found["n"] == 40 and 0.5 < found["variety"] < 1.2
    shown = collect(small(), tmp_path)["shown"]["pictures"]
    np.testing.assert_array_equal(shown, pictures[:5])
    assert fidelity(shown, shown, lpips=False)["fidelity"] == 0
    grey = np.full_like(shown, 51)
    assert fidelity(grey, grey + 51, lpips=False)["fidelity"] == pytest.approx(0.2)


def test_an_interruption_loses_one_block_and_changes_nothing(tmp_path):
    whole = measured(noise, small(), tmp_path / "whole")
    asked = []

    def stops(captions, first):
        asked.append(first)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return noise(captions, first)

    with pytest.raises(KeyboardInterrupt):
        make(stops, small(), tmp_path / "parts")
    assert measured(stops, small(), tmp_path / "parts") == whole
    assert asked == [0, 8, 16, 24, 24, 32, VARIED, VARIED + 8]
    assert measured(stops, small(), tmp_path / "parts") == whole
    assert len(asked) == 8  # nothing is made twice


def test_a_damaged_block_is_made_again(tmp_path):
    whole = measured(noise, small(), tmp_path)
    file = rows.path(tmp_path / "plain", range(8, 16))
    file.write_bytes(file.read_bytes()[:-40])
    rows.path(tmp_path / "plain", range(0, 8)).write_bytes(b"")
    asked = []

    def counting(captions, first):
        asked.append(first)
        return noise(captions, first)

    assert measured(counting, small(), tmp_path) == whole
    assert asked == [0, 8]


def test_two_processes_make_what_one_does(tmp_path, monkeypatch):
    """Their shares, made one after the other; `long` tests run real processes."""
    whole = measured(noise, small(), tmp_path / "one")
    asked = {0: [], 1: []}
    monkeypatch.setattr("stepdistill.distributed.world", lambda: 2)
    monkeypatch.setattr("stepdistill.distributed.wait", lambda: None)
    for rank in (1, 0):
        monkeypatch.setattr("stepdistill.distributed.rank", lambda rank=rank: rank)

        def share(captions, first, rank=rank):
            asked[rank].append(first)
            return noise(captions, first)

        make(share, small(), tmp_path / "two")
    assert figures(small(), collect(small(), tmp_path / "two")) == whole
    assert asked == {0: [0, 16, 32, VARIED], 1: [8, 24, VARIED + 8]}


def test_progress_counts_pictures(tmp_path):
    seen = []
    make(noise, small(10, 1, 4), tmp_path, lambda *at: seen.append(at))
    assert seen == [(8, 14), (10, 14), (14, 14)]


def test_drawings_themselves(tmp_path, monkeypatch):
    """A perfect sampler of the embedded world: near the floor, aligned, and as diverse and colourful as drawings."""
    monkeypatch.setattr(rows, "BLOCK", 128)
    suite = tiny_suite(160, captions=6, each=12, shown=3)
    found = measured(drawer, suite, tmp_path)
    assert found["alignment"] > 0.98 and found["whole"] > 0.95 and found["n"] == 160
    assert found["fd_low"] <= found["fd"] <= found["fd_high"]
    assert found["fd"] < 1.5 * tiny.floor(160)[0]
    assert found["diversity"] == pytest.approx(1, abs=0.2)
    assert found["saturation_relative"] == pytest.approx(1, abs=0.1)
    assert found["precision"] > 0.9 and found["recall"] > 0.7
    equal = measured(lambda captions, first: drawer(captions, 0)[:1].repeat(len(captions), 0), suite, tmp_path / "equal")
    assert equal["vendi"] == pytest.approx(1, abs=1e-4)
    assert found["vendi"] > 1.002  # little: all features of the judge point nearly one way
    assert equal["recall"] == 0 and equal["coverage"] < 0.1


def test_what_decides_figures_is_told():
    one, other = small(), small(n=41)
    assert one.compared["prompts"] != other.compared["prompts"] and one.compared["n"] == 40
    assert one.compared["groups"] == "3 prompts x 4" and one.compared["size"] == "16x16"
    made = tiny_suite(65, captions=0).compared
    assert made["groups"] == "none" and {"weights", "filter", "reference"} <= made["features"]["judge"].keys()


def test_bad_pictures_are_refused(tmp_path):
    for wrong in (np.zeros((8, 16, 16, 3)), np.zeros((7, 16, 16, 3), np.uint8), [1, 2], np.zeros((8, 16, 16), np.uint8)):
        with pytest.raises(ValueError, match="return a uint8 array"):
            make(lambda captions, first, made=wrong: made, small(), tmp_path)
    with pytest.raises(UserError, match=r"64 pictures are too few .* in 64 features: .* 65 or more"):
        tiny_suite(64)
