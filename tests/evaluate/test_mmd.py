"""KID and CMMD against their formulas written out, and against what they are for Gaussians."""

import numpy as np
import pytest
import torch

from stepdistill.errors import UserError
from stepdistill.evaluate import mmd
from stepdistill.evaluate.mmd import cmmd, kid, rbf_mmd


def rng(seed=0):
    return np.random.default_rng(seed)


def unbiased(x, y):
    """Binkowski et al. 2018: sums over unequal pairs within, over all pairs across."""
    k = lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3  # noqa: E731
    n = len(x)
    within = sum((k(a, a).sum() - np.trace(k(a, a))) / (n * (n - 1)) for a in (x, y))
    return within - 2 * k(x, y).mean()


def test_kid_of_one_subset_of_all_rows_is_the_unbiased_formula():
    x, y = rng(1).normal(size=(40, 6)), rng(2).normal(0.5, 2, size=(40, 6))
    assert kid(x, y, subsets=3, size=40) == pytest.approx((unbiased(x, y), 0), rel=1e-9, abs=1e-9)


def test_kid_of_gaussians():
    """N(0, A) and N(0, B): E (x.y / D + 1)^3 = 1 + 3 tr(AB) / D^2, so the squared discrepancy is 3 tr((A - B)^2) / D^2."""
    a, b = np.array([1.0, 2, 3, 4]), np.array([4.0, 2, 1, 1])
    x, y = rng(3).normal(size=(4000, 4)) * np.sqrt(a), rng(4).normal(size=(4000, 4)) * np.sqrt(b)
    want = 3 * np.square(a - b).sum() / 4**2
    mean, spread = kid(x, y, subsets=100, size=400)
    assert mean == pytest.approx(want, rel=0.1)
    assert 0 < spread < want  # of one subset


def test_kid_of_gaussians_apart_in_one_dimension():
    """E (xy + 1)^3 is a sum of products of raw moments."""

    def raw(m, v):
        return np.array([1, m, m**2 + v, m**3 + 3 * m * v])

    def kernel(a, b):
        return (np.array([1, 3, 3, 1]) * a * b).sum()

    one, two = raw(0.2, 0.5), raw(-0.3, 1.0)
    want = kernel(one, one) + kernel(two, two) - 2 * kernel(one, two)
    x, y = rng(5).normal(0.2, 0.5**0.5, size=(20_000, 1)), rng(6).normal(-0.3, 1, size=(20_000, 1))
    assert kid(x, y, subsets=60, size=500)[0] == pytest.approx(want, rel=0.1)


def test_kid_of_equal_laws_is_zero_on_average():
    values = [kid(*rng(seed).normal(size=(2, 64, 8)), subsets=1, size=64)[0] for seed in range(100)]
    error = np.std(values) / 10
    assert abs(np.mean(values)) < 3 * error and min(values) < 0 < max(values)
    bias = 2 * (4 - 1) / 64  # what the pairs of a row with itself would add: E (|x|^2 / 8 + 1)^3 is above 4
    assert bias > 10 * error


def test_kid_is_a_function_of_its_seed_and_leaves_the_generator_alone():
    x, y = rng(7).normal(size=(2, 90, 3))
    before = torch.get_rng_state()
    assert kid(x, y, 5, 30, seed=1) == kid(x, y, 5, 30, seed=1) != kid(x, y, 5, 30, seed=2)
    assert torch.equal(before, torch.get_rng_state())


def test_subsets_of_small_sets_are_halves():
    x, y = rng(8).normal(size=(30, 3)), rng(9).normal(size=(50, 3))
    assert kid(x, y, subsets=7) == kid(x, y, subsets=7, size=15)
    assert kid(x, y, subsets=7)[1] > 0


def gaussian_kernel(gap, cov, sigma):
    """E exp(-|x - y|^2 / (2 sigma^2)) where x - y is N(gap, cov)."""
    inside = np.eye(len(gap)) + cov / sigma**2
    return np.exp(-gap @ np.linalg.solve(inside, gap) / (2 * sigma**2)) / np.linalg.det(inside) ** 0.5


def test_rbf_discrepancy_of_gaussians_with_the_bias_of_the_pairs_with_oneself():
    n, sigma, m = 60, 1.5, np.array([0.6, 0, -0.3])
    a, b = np.diag([1.0, 2, 0.5]), np.diag([0.5, 1, 1.0])
    values = [
        rbf_mmd(
            torch.from_numpy(rng(2 * k).normal(size=(n, 3)) @ a**0.5 + m),
            torch.from_numpy(rng(2 * k + 1).normal(size=(2 * n, 3)) @ b**0.5),
            sigma,
        )
        for k in range(200)
    ]
    same = [gaussian_kernel(0 * m, 2 * c, sigma) for c in (a, b)]
    exact = sum(same) - 2 * gaussian_kernel(m, a + b, sigma)
    excess = (1 - same[0]) / n + (1 - same[1]) / (2 * n)
    error = np.std(values) / len(values) ** 0.5
    assert np.mean(values) == pytest.approx(exact + excess, abs=3 * error)
    assert excess > 6 * error


def test_cmmd_of_two_points():
    """1000 (2 - 2 exp(-d^2 / 200)), with d the distance at unit length."""
    x, y = np.repeat([[3.0, 0]], 5, axis=0), np.repeat([[0, 0.1]], 7, axis=0)
    assert cmmd(x, y) == pytest.approx(2000 * (1 - np.exp(-2 / 200)), rel=1e-12)
    assert cmmd(x, -x) == pytest.approx(2000 * (1 - np.exp(-4 / 200)), rel=1e-12)
    assert cmmd(x, 9 * x) == 0


def test_blocks_change_nothing(monkeypatch):
    x, y = rng(10).normal(size=(50, 5)), rng(11).normal(1, 1, size=(33, 5))
    whole = cmmd(x, y)
    monkeypatch.setattr(mmd, "BLOCK", 8)
    assert cmmd(x, y) == pytest.approx(whole, rel=1e-9)
    assert cmmd(x, y) == pytest.approx(cmmd(y, x), rel=1e-9)


def test_bad_input_is_refused():
    with pytest.raises(UserError, match="one network"):
        kid(np.ones((9, 3)), np.ones((9, 4)))
    with pytest.raises(UserError, match="at least 4"):
        kid(np.ones((3, 3)), np.ones((9, 3)))
    with pytest.raises(UserError, match="finite"):
        cmmd(np.full((3, 3), np.nan), np.ones((9, 3)))
    with pytest.raises(UserError, match=r"row 1 .* zeros"):
        cmmd(np.array([[1.0, 2], [0, 0]]), np.ones((3, 2)))
