"""Precision, recall, density and coverage by hand, and of sets whose figures are known."""

import numpy as np
import pytest

from stepdistill.errors import UserError
from stepdistill.evaluate import manifold
from stepdistill.evaluate.manifold import PRDC, precision_recall


def line(*places):
    return np.array(places, dtype=float)[:, None]


def rows(n, seed, shift=0.0, d=6):
    return np.random.default_rng(seed).normal(shift, 1, size=(n, d))


def test_by_hand():
    """Reference 0, 1, 3, 7 with k = 1: balls of radius 1, 1, 2, 4. Pictures 0.5, 4, 20, 21: radii 3.5, 3.5, 1, 1."""
    got = precision_recall(line(0.5, 4, 20, 21), line(0, 1, 3, 7), k=1)
    # 0.5 lies in the balls of 0 and 1, 4 in those of 3 and 7, the others in none; 7 is near 4, and 0, 1, 3 are near 0.5.
    assert got == PRDC(precision=2 / 4, recall=1, density=(2 + 2) / 4, coverage=1)


def test_by_hand_with_two_neighbours():
    """Reference 0, 1, 3, 7 with k = 2: radii 3, 2, 3, 6. Pictures 5, 5.5, 40: radii 35, 34.5, 35."""
    got = precision_recall(line(5, 5.5, 40), line(0, 1, 3, 7), k=2)
    # 5 and 5.5 lie in the balls of 3 and 7; 40 in none. All are within 35 of 5.
    assert got == PRDC(precision=2 / 3, recall=1, density=4 / (2 * 3), coverage=2 / 4)


def test_by_hand_with_rows_on_borders():
    """Reference 0, 2, 3, 10 with k = 1: radii 2, 1, 1, 7. Pictures 2, 2.1, 4.2: radii 0.1, 0.1, 2.1."""
    got = precision_recall(line(2, 2.1, 4.2), line(0, 2, 3, 10), k=1)
    # 0 holds 2, on its border; 2 and 3 hold 2 and 2.1; 10 holds 4.2. 2 is within 0.1 of 2, 3 within 2.1 of 4.2.
    assert got == PRDC(precision=1, recall=2 / 4, density=(3 + 2 + 1) / 3, coverage=1)


def test_identical_sets():
    """A row's ball holds the row itself and k others, the last on its border: density (k + 1) / k."""
    x = rows(200, 0)
    for k in (1, 3, 5):
        assert precision_recall(x, x, k) == pytest.approx((1, 1, (k + 1) / k, 1))


def test_disjoint_sets():
    assert precision_recall(rows(60, 1), rows(60, 2, shift=100)) == (0, 0, 0, 0)


def test_equal_laws():
    """Coverage is 1 - (N - 1)...(N - k) / ((2N - 1)...(2N - k)) on average (Naeem et al., Lemma 2); density is 1."""
    n, k = 300, 3
    found = np.array([precision_recall(rows(n, 2 * i), rows(n, 2 * i + 1), k) for i in range(20)])
    want = 1 - np.prod([(n - j) / (2 * n - j) for j in range(1, k + 1)])
    assert found[:, 3].mean() == pytest.approx(want, abs=0.01)
    assert found[:, 2].mean() == pytest.approx(1, abs=0.1)


def test_a_subset_of_modes():
    """Of four far modes the pictures have one: all are likely, a quarter of the reference is near one."""
    modes = np.concatenate([rows(100, 10 + i, shift=100 * i) for i in range(4)])
    precision, recall, _, coverage = precision_recall(rows(100, 20), modes, k=20)
    assert (precision, recall, coverage) == pytest.approx((1, 0.25, 0.25), abs=0.03)
    precision, recall, _, _ = precision_recall(modes, rows(100, 20), k=20)
    assert (precision, recall) == pytest.approx((0.25, 1), abs=0.03)


def test_one_outlier_of_the_reference_raises_precision_more_than_density():
    """What density is for (Naeem et al., Fig. 2): the outlier's huge ball holds pictures that are unlike the rest."""
    real = np.concatenate([rows(200, 30), rows(1, 31, shift=60)])
    fake = rows(200, 32, shift=30)
    precision, _, density, coverage = precision_recall(fake, real, k=5)
    assert precision == 1 and density == pytest.approx(1 / 5) and coverage == pytest.approx(1 / 201)


def test_copies_lie_in_balls_without_extent():
    x = np.repeat(rows(5, 40), 4, axis=0)
    assert precision_recall(x + 1e3, x + 1e3, k=3) == pytest.approx((1, 1, 4 / 3, 1))


def test_blocks_change_nothing(monkeypatch):
    x, y = rows(70, 50), rows(53, 51, shift=0.3)
    whole, twin = precision_recall(x, y), precision_recall(y, y)
    monkeypatch.setattr(manifold, "BLOCK", 8)
    assert precision_recall(x, y) == whole
    assert precision_recall(y, y) == twin


def test_bad_input_is_refused():
    with pytest.raises(UserError, match="at least 6 of each"):
        precision_recall(rows(5, 0), rows(9, 1))
    with pytest.raises(UserError, match="k of at least 1"):
        precision_recall(rows(5, 0), rows(9, 1), k=0)
    with pytest.raises(UserError, match="one network"):
        precision_recall(rows(9, 0), rows(9, 1, d=7))
