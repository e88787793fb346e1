"""The Frechet distance against closed forms, and its interval against repetition."""

import numpy as np
import pytest
import torch

from stepdistill.errors import UserError
from stepdistill.evaluate.frechet import Moments, bias, frechet, frechet_interval, influence, moments, needed

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


def test_moments():
    x = RNG.normal(size=(50, 3))
    mean, cov = moments(x)
    np.testing.assert_allclose(mean, x.mean(0), atol=1e-12)
    np.testing.assert_allclose(cov, np.cov(x.T), atol=1e-12)


def test_interval_covers_what_other_samples_give():
    """The mean FD over many samples of N lies in a sample's interval about 95 times in a hundred."""
    rng = np.random.default_rng(1)
    reference = Moments(np.zeros(4), np.eye(4))
    runs = [frechet_interval(rng.normal(0.15, 1.1, size=(200, 4)), reference) for _ in range(120)]
    truth = np.mean([fd for fd, _, _ in runs])
    assert all(0 <= low <= fd <= high for fd, low, high in runs)
    assert 0.88 <= np.mean([low <= truth <= high for _, low, high in runs]) < 1
    spread = np.std([fd for fd, _, _ in runs])
    assert 0.8 < np.mean([high - low for _, low, high in runs]) / (3.92 * spread) < 1.3


def test_influence_is_the_derivative_by_a_row_s_weight():
    """Giving row i the share e more of all weight changes FD by e times its influence."""
    x, c = RNG.normal(0.3, 1, size=(500, 3)) @ spd(3) / 3, spd(3)
    reference = Moments(torch.zeros(3, dtype=torch.float64), torch.from_numpy(c))
    got, n, e = influence(x, reference), len(x), 1e-5

    def weighted(i, e):
        p = np.full(n, (1 - e) / n) + e * (np.arange(n) == i)
        mean = p @ x
        return frechet(mean, (x - mean).T @ ((x - mean) * p[:, None]) * n / (n - 1), np.zeros(3), c)

    want = np.array([(weighted(i, e) - weighted(i, -e)) / (2 * e) for i in range(10)])
    np.testing.assert_allclose(got[:10], want, atol=0.01 * got.std().item())
    assert got.mean().abs() < 0.01 * got.std()


def test_samples_of_known_gaussians_lie_above_the_exact_distance_by_the_bias():
    """To order 1/n, for n pictures against exact moments and against another sample."""
    n, d = 400, 6
    near = spd(d) / d + np.eye(d)  # so near that the bias is not lost in the spread
    one, two = (Moments(*map(torch.from_numpy, (np.full(d, m), near + c * spd(d)))) for m, c in ((0, 0.0), (0.05, 0.02)))
    exact = frechet(*one, *two)
    roots = [np.linalg.cholesky(at.cov.numpy()) for at in (one, two)]

    def sample(at, root, n):
        return moments(at.mean.numpy() + RNG.normal(size=(n, d)) @ root.T)

    alone = [frechet(*sample(one, roots[0], n), *two) - exact for _ in range(150)]
    both = [frechet(*sample(one, roots[0], n), *sample(two, roots[1], 2 * n)) - exact for _ in range(150)]
    for errors, want in ((alone, bias(one, two, n)), (both, bias(one, two, n) + bias(two, one, 2 * n))):
        error = np.std(errors) / len(errors) ** 0.5
        assert want > 10 * error  # so that no bias, or half of it, would fail
        assert np.mean(errors) == pytest.approx(want, abs=3 * error + 0.03 * want)


def test_bias_in_one_dimension():
    """Var mean = c1 / n, and the mean of the root of a variance lies below it by sqrt(c1) / (4 n)."""
    one, two = ([[9.0]], [[4.0]])
    assert bias(Moments([0.0], one), Moments([5.0], two), 100) == pytest.approx((9 + 3 * 2 / 2) / 100)


def test_too_few_pictures_are_refused():
    reference = Moments(np.zeros(4), np.eye(4))
    assert needed(4) == 5
    assert frechet_interval(RNG.normal(size=(5, 4)), reference)[0] > 0
    with pytest.raises(UserError, match=r"4 pictures are too few.* in 4 features: give at least 5"):
        frechet_interval(RNG.normal(size=(4, 4)), reference)
    with pytest.raises(UserError, match=r"at least 2049, .* 10,000"):
        frechet_interval(np.zeros((9, 2048)), Moments(np.zeros(2048), np.zeros((2048, 2048))))


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
