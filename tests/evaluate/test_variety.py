"""The Vendi score where it is known, and distances within a group."""

from itertools import combinations, pairwise

import numpy as np
import pytest

from stepdistill.errors import UserError
from stepdistill.evaluate import variety
from stepdistill.evaluate.likeness import likeness
from stepdistill.evaluate.variety import pairwise_lpips, pairwise_ssim_distance, vendi
from stepdistill.tiny.world import draw, scenes


@pytest.fixture(scope="module")
def drawings():
    return draw(scenes(1, 6) * 5, 6).images


def test_vendi_scores_that_are_known():
    one = np.array([[3.0, 4, 0, 0]])
    assert vendi(np.repeat(one, 7, axis=0)) == pytest.approx(1)
    assert vendi(np.diag([1.0, 2, 3, 4, 5])) == pytest.approx(5)  # orthogonal
    assert vendi(np.repeat(np.eye(3)[:2], [4, 4], axis=0)) == pytest.approx(2)  # two groups
    assert vendi(np.eye(3)[[0, 0, 0, 1]]) == pytest.approx(np.exp(-0.75 * np.log(0.75) - 0.25 * np.log(0.25)))
    assert vendi(one) == pytest.approx(1)


def test_vendi_of_two_at_an_angle():
    """The eigenvalues of K / 2 are (1 + c) / 2 and (1 - c) / 2, c the cosine."""
    c = np.cos(0.7)
    want = np.exp(-sum(p * np.log(p) for p in ((1 + c) / 2, (1 - c) / 2)))
    assert vendi(np.array([[2.0, 0], [5 * c, 5 * np.sin(0.7)]])) == pytest.approx(want)


def test_vendi_is_the_same_by_rows_and_by_columns():
    """More rows than features take the features' matrix; zeros appended as features must change nothing."""
    x = np.random.default_rng(0).normal(size=(20, 6))
    assert vendi(np.pad(x, ((0, 0), (0, 30)))) == pytest.approx(vendi(x), rel=1e-9)
    assert 5 < vendi(x) <= 6


def test_distance_within_a_group_is_the_mean_over_pairs(drawings):
    pairs = [likeness(drawings[[i]], drawings[[j]])["dssim"][0] for i, j in combinations(range(5), 2)]
    assert pairwise_ssim_distance(drawings) == pytest.approx(np.mean(pairs), rel=1e-5)
    assert np.ptp(pairs) > 0.01


def test_diversity_falls_to_zero_as_samples_are_made_equal(drawings):
    first, found = drawings[:1].astype(float), []
    for share in (0, 0.4, 0.8, 1):
        mixed = ((1 - share) * drawings + share * first).round().astype(np.uint8)
        found.append((pairwise_ssim_distance(mixed), vendi(mixed.reshape(5, -1) / 255.0)))
    assert all(a > b for before, after in pairwise(found) for a, b in zip(before, after, strict=True))
    assert found[-1] == pytest.approx((0, 1), abs=1e-3) and found[0][0] > 0.1


def test_blocks_change_nothing(drawings, monkeypatch):
    whole = pairwise_ssim_distance(drawings)
    monkeypatch.setattr(variety, "PIXELS", 3 * 64 * 64)
    assert pairwise_ssim_distance(drawings) == pytest.approx(whole, rel=1e-6)


def test_lpips_of_a_group(package):
    """The stand-in is 2 (a - b)^2 in [-1, 1]: 8 (a - b)^2 in [0, 1]."""
    group = np.array([0, 51, 255], dtype=np.uint8)[:, None, None, None] * np.ones((16, 16, 3), dtype=np.uint8)
    assert pairwise_lpips(group) == pytest.approx(8 * np.mean([0.2**2, 1, 0.8**2]), rel=1e-5)
    assert pairwise_lpips(group[[0, 0]]) == 0


def test_bad_input_is_refused(drawings):
    with pytest.raises(UserError, match="at least 2 pictures"):
        pairwise_ssim_distance(drawings[:1])
    with pytest.raises(UserError, match="uint8"):
        pairwise_ssim_distance(drawings / 255)
    with pytest.raises(UserError, match="all zeros"):
        vendi(np.eye(3)[[0, 1, 2]] * [1, 1, 0])
    with pytest.raises(UserError, match="finite"):
        vendi(np.array([[np.inf, 1]]))
