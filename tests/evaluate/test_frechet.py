"""The Frechet distance against closed forms, and its interval against repetition."""

import numpy as np
import pytest

from stepdistill.evaluate.frechet import Moments, frechet, frechet_interval, moments

RNG = np.random.default_rng(0)


def spd(d):
    a = RNG.normal(size=(d, d))
    return a @ a.T + 0.1 * np.eye(d)


def test_one_dimension():
    """(m1 - m2)^2 + (s1 - s2)^2."""
    assert frechet([1.0], [[4.0]], [3.0], [[0.25]]) == pytest.approx(4 + 1.5**2, rel=1e-12)


def test_commuting_covariances():
    """Same eigenvectors: |m1 - m2|^2 + sum (sqrt a - sqrt b)^2."""
    q, _ = np.linalg.qr(RNG.normal(size=(8, 8)))
    a, b = RNG.random(8) + 0.1, RNG.random(8)
    b[0] = 0  # a flat direction is allowed
    m = RNG.normal(size=(2, 8))
    want = np.square(m[0] - m[1]).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    assert frechet(m[0], q * a @ q.T, m[1], q * b @ q.T) == pytest.approx(want, rel=1e-7)


def test_covariances_that_do_not_commute():
    """A positive matrix A carries N(0, C) to N(0, ACA) optimally, at the cost tr((1 - A) C (1 - A))."""
    c, a, eye = spd(6), spd(6) / 6, np.eye(6)
    moved = a @ c @ a
    want = np.trace((eye - a) @ c @ (eye - a))
    assert frechet(np.zeros(6), c, np.zeros(6), moved) == pytest.approx(want, rel=1e-9)
    assert frechet(np.zeros(6), moved, np.zeros(6), c) == pytest.approx(want, rel=1e-9)


def test_zero_for_equals():
    m, c = RNG.normal(size=5), spd(5)
    assert frechet(m, c, m, c) == pytest.approx(0, abs=1e-9)


def test_moments_and_weights():
    x = RNG.normal(size=(50, 3))
    mean, cov = moments(x)
    np.testing.assert_allclose(mean, x.mean(0), atol=1e-12)
    np.testing.assert_allclose(cov, np.cov(x.T), atol=1e-12)
    counts = RNG.integers(0, 4, size=50)
    for got, want in zip(moments(x, counts), moments(np.repeat(x, counts, axis=0)), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-12)


def test_interval_covers_what_other_samples_give():
    """The mean FD over many samples of N lies in a sample's interval about 95 times in a hundred."""
    rng = np.random.default_rng(1)
    reference = Moments(np.zeros(4), np.eye(4))
    runs = [frechet_interval(rng.normal(0.15, 1.1, size=(200, 4)), reference, resamples=80, seed=i) for i in range(40)]
    truth = np.mean([fd for fd, _, _ in runs])
    assert all(0 <= low <= fd <= high for fd, low, high in runs)
    assert 0.85 <= np.mean([low <= truth <= high for _, low, high in runs]) < 1
    spread = np.std([fd for fd, _, _ in runs])
    assert 0.6 < np.mean([high - low for _, low, high in runs]) / (3.92 * spread) < 1.5


def test_interval_is_deterministic_in_its_seed():
    x, reference = RNG.normal(size=(64, 3)), Moments(np.zeros(3), np.eye(3))
    assert frechet_interval(x, reference, seed=4) == frechet_interval(x, reference, seed=4)
    assert frechet_interval(x, reference, seed=4) != frechet_interval(x, reference, seed=5)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"\[D\] and \[D, D\]"):
        frechet([0.0, 0.0], [[1.0]], [0.0], [[1.0]])
    with pytest.raises(ValueError, match="semi-definite"):
        frechet([0.0], [[-1.0]], [0.0], [[1.0]])
    with pytest.raises(ValueError, match="one judge"):
        frechet([0.0], [[1.0]], [0.0, 0.0], np.eye(2))
    with pytest.raises(ValueError, match="finite"):
        moments([[np.nan], [1.0]])
    with pytest.raises(ValueError, match="at least 2"):
        moments([[1.0]])
