"""What pictures look like, and a distance of it: closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stepdistill.evaluate.looks import BANDS, GROUPS, SIDE, detail, energy, in_units, looks, unlike


def pictures(n, seed=0, size=32):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def test_a_thumbnail_is_means_and_checks_are_detail_of_one_octave():
    board = np.indices((32, 32)).sum(0) % 2 * 255  # black and white by the pixel: 0.5 on average
    squares = np.kron(np.indices((16, 16)).sum(0) % 2, np.ones((2, 2))) * 255  # the same by two pixels
    rows = looks(np.stack([board, squares], 0).astype(np.uint8)[..., None].repeat(3, -1))
    thumbnails, colours, bands = rows.split(GROUPS, 1)
    assert thumbnails.shape == (2, 3 * SIDE**2) and torch.allclose(thumbnails, torch.tensor(0.5, dtype=torch.float64))
    assert torch.allclose(bands, torch.tensor([[0.5, 0, 0], [0, 0.5, 0]], dtype=torch.float64), atol=1e-6)
    assert torch.allclose(colours, torch.tensor([0.0, 0.5, 0.5], dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 33])
def test_small_and_odd_pictures_have_looks_too(size):
    rows = looks(pictures(3, size=size))
    assert rows.shape == (3, sum(GROUPS)) and rows.isfinite().all()
    assert detail(torch.rand(2, 3, size, size)).shape == (2, BANDS)


def test_each_group_of_columns_weighs_the_same_whatever_its_scale():
    rows = torch.randn(200, sum(GROUPS), dtype=torch.float64) * torch.cat(
        [torch.full((n,), 10.0**k) for k, n in enumerate(GROUPS)]
    )
    spread = [part.var(0).sum() for part in in_units(rows, rows).split(GROUPS, 1)]
    assert torch.allclose(torch.stack(spread), torch.ones(3, dtype=torch.float64))


def test_the_energy_distance_of_points_is_known():
    x, y = torch.zeros(1, 2, 1), torch.full((1, 2, 1), 3.0)
    assert energy(x, y) == pytest.approx(6)  # 2 * 3 - 0 - 0
    assert energy(x, x) == energy(y, y) == 0
    pair = torch.tensor([[[0.0], [2.0]]])
    assert energy(pair, pair) == pytest.approx(2 * 2 - 2 - 2)
    assert energy(pair, pair.flip(1)) == pytest.approx(0 - 2 - 2)  # pairs of one index count nowhere


@pytest.mark.parametrize("paired", [True, False])
def test_it_is_nothing_on_average_for_equal_laws_whether_they_share_noise_or_not(paired):
    torch.manual_seed(0)
    x = torch.randn(4000, 4, 2)
    same = x + 0.01 * torch.randn_like(x) if paired else torch.randn_like(x)
    assert abs(energy(x, same)) < 0.02
    assert energy(x, 0.1 * same) > 0.3  # a collapse
    assert energy(x, same + 1) > 0.3
    assert energy(x, same + 2) > 2 * energy(x, same + 1)


def test_groups_are_compared_with_themselves_alone():
    x = torch.tensor([[[0.0], [0.0]], [[5.0], [5.0]]])
    assert energy(x, x) == 0 and energy(x, x.flip(0)) == pytest.approx(10)


def test_unlikeness_is_a_root_mean_square_to_the_others_of_the_group():
    x = torch.tensor([[[0.0, 0.0], [2.0, 2.0], [4.0, 4.0]]])
    assert torch.allclose(unlike(x), torch.tensor([[3.0, 2.0, 3.0]]))
