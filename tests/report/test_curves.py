"""Curves of training: thinned without losing a peak, and each beside what its strategy says of it."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from stepdistill.report.curves import POINTS, drawn, health, smoothed
from stepdistill.report.pictures import evenly
from stepdistill.report.plots import COLOURS, curve, quality
from stepdistill.report.plots import Series as Line
from stepdistill.report.read import read_log
from stepdistill.strategies import STRATEGIES


def test_a_long_curve_keeps_its_peaks_and_its_order():
    values = np.random.default_rng(0).normal(size=5000)
    values[1234], values[4321] = 50, -60
    made = drawn(list(range(1, 5001)), values.tolist())
    assert 100 < len(made.steps) <= POINTS and (np.diff(made.steps) > 0).all()
    assert made.values[made.steps == 1235] == 50 and made.values[made.steps == 4322] == -60
    assert np.abs(made.trend).max() < 1 and len(made.trend) == len(made.steps)


def test_a_trend_is_drawn_of_noise_only():
    x = np.linspace(0, 3, 300)
    assert len(drawn(list(range(300)), np.sin(x).tolist()).trend) == 0
    assert len(drawn(list(range(300)), (x + np.random.default_rng(0).normal(size=300)).tolist()).trend) == 300
    short = drawn([1, 2, 3], [1.0, float("nan"), 0.0])
    assert short.steps.tolist() == [1, 3] and len(short.trend) == 0


def test_smoothing_keeps_constants_and_means():
    assert np.allclose(smoothed(np.full(9, 2.0), 4), 2)
    assert smoothed(np.array([0.0, 0, 3, 0, 0]), 2).tolist() == [0, 1, 1, 1, 0]
    assert smoothed(np.array([4.0, 0, 0, 0]), 2)[0] == 2  # of two values at an end


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_says_something_of_what_it_logs(name):
    docs = STRATEGIES[name].__doc__
    logged = sorted({word for word in re.findall(r"\b(?:student|critic)\w*/\w+", docs) if not word.endswith("/lr")})
    made = health(STRATEGIES[name], [*logged, "student/lr"])
    assert made.seen.startswith("Seen in ")
    assert all(key in made.lines[key] or "/" in made.lines[key] for key in logged) and made.lines["student/lr"]
    assert len(made.sick) == docs.count("- Sick:")


def test_a_bullet_belongs_to_the_curves_that_it_names_first():
    class Method:
        """It learns.

        Healthy curves: seen once.

        - student/a falls; student/b
          rises.
        - student/b is not told twice.
        - Sick: student/c grows.
        """

    made = health(Method, ["student/a", "student/b", "student/c", "student/grad_norm"])
    assert made.seen == "Seen once." and made.sick == ["Student/c grows."]
    assert made.lines["student/a"] == made.lines["student/b"] == "student/a falls; student/b rises."
    assert made.lines["student/c"] == "" and "clipped" in made.lines["student/grad_norm"]
    assert health(None, ["x/y"]).lines == {"x/y": ""}


def test_the_clock_of_a_resumed_run_begins_again(tmp_path):
    lines = [{"step": k, "seconds": s, "student/a": k} for k, s in ((1, 10), (2, 20), (3, 4), (4, 8))]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert read_log(tmp_path / "log.jsonl") == ({"student/a": ([1, 2, 3, 4], [1, 2, 3, 4])}, 28)


def test_colours_are_the_page_s_and_numbers_of_axes_are_whole():
    values = np.geomspace(0.001, 10, 50)
    texts = [curve(key, "a/b", drawn(list(range(50)), values.tolist()), [20], "student") for key in ("one", "other")]
    texts.append(quality("q", "FD", [Line("x", "run2", [(1, 9.0, 8.5, 9.5), (4, 90.0, None, None)])], 8.0))
    for text in texts:
        assert text.startswith("<svg viewBox=") and "var(--soft)" in text and not any(c in text for c in COLOURS.values())
        assert "<metadata" not in text and "DejaVu" not in text
    assert "var(--student)" in texts[0] and "var(--run2)" in texts[2]
    assert ">0.001<" in texts[0]  # a logarithmic axis in plain numbers
    ids = [set(re.findall(r' id="(.*?)"', text)) for text in texts]
    assert all(ids) and not ids[0] & ids[1]


def test_evenly_keeps_both_ends():
    assert evenly(range(5), 24) == [0, 1, 2, 3, 4] and evenly(range(100), 4) == [0, 33, 66, 99] and evenly([7], 3) == [7]
