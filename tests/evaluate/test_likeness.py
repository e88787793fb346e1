"""Distances to the teacher's pictures against closed forms."""

from urllib.error import URLError

import numpy as np
import pytest

from stepdistill import perceptual
from stepdistill.errors import UserError
from stepdistill.evaluate import likeness as module
from stepdistill.evaluate.likeness import likeness

RNG = np.random.default_rng(0)


def grey(level, side=16):
    return np.full((1, side, side, 3), level, dtype=np.uint8)


def test_equal_pictures_are_at_no_distance():
    x = RNG.integers(0, 256, size=(3, 20, 24, 3), dtype=np.uint8)
    got = likeness(x, x)
    assert got["rmse"].tolist() == [0, 0, 0]
    np.testing.assert_allclose(got["dssim"], 0, atol=1e-5)


def test_uniform_pictures():
    """Without structure SSIM is its luminance term (2 a b + c) / (a^2 + b^2 + c), c = 0.01^2."""
    a, b = 51 / 255, 204 / 255
    got = likeness(grey(51), grey(204))
    assert got["rmse"][0] == pytest.approx(b - a, rel=1e-6)
    assert got["dssim"][0] == pytest.approx(1 - (2 * a * b + 1e-4) / (a**2 + b**2 + 1e-4), rel=1e-4)
    assert likeness(grey(0), grey(255))["rmse"][0] == 1


def test_ssim_does_not_depend_on_what_else_is_compared():
    """The range is 1, not that of the pictures at hand."""
    x, y = (RNG.integers(100, 120, size=(2, 16, 16, 3), dtype=np.uint8) for _ in range(2))
    alone = [likeness(x[[i]], y[[i]])["dssim"][0] for i in range(2)]
    wide = [np.concatenate([a, b]) for a, b in ((x, grey(0)), (y, grey(255)))]
    assert likeness(*wide)["dssim"][:2] == pytest.approx(alone, rel=1e-5)


def test_rmse_of_one_channel():
    x, y = grey(0), grey(0)
    y[..., 1] = 255
    assert likeness(x, y)["rmse"][0] == pytest.approx(3**-0.5)


def test_both_distances_grow_with_noise():
    x = np.full((4, 32, 32, 3), 128) + 40 * np.sin(np.arange(32))[:, None]
    found = [
        likeness(*((x + s * RNG.normal(size=x.shape)).round().clip(0, 255).astype(np.uint8) for s in (0, k)))
        for k in (4, 9, 20)
    ]
    for name in ("rmse", "dssim"):
        means = [one[name].mean() for one in found]
        assert means[0] > 0 and means[1] > 1.5 * means[0] and means[2] > 1.5 * means[1]


def test_blocks_change_nothing(monkeypatch):
    x, y = RNG.integers(0, 256, size=(2, 5, 16, 16, 3), dtype=np.uint8)
    whole = likeness(x, y)
    monkeypatch.setattr(module, "PIXELS", 2 * 16 * 16)
    for name, parts in likeness(x, y).items():
        np.testing.assert_allclose(parts, whole[name], rtol=1e-5)


def test_lpips_where_it_is_installed(package):
    got = likeness(grey(0), grey(51))
    assert got["lpips"] == pytest.approx([2 * 0.4**2], rel=1e-5)  # the stand-in: 2 (a - b)^2 in [-1, 1]
    assert got.keys() == {"rmse", "dssim", "lpips"}


def test_weights_that_cannot_be_downloaded_are_named(package, monkeypatch):
    def fails(**_):
        raise URLError("no network")

    monkeypatch.setattr(package, "LPIPS", fails)
    perceptual.network.cache_clear()
    with pytest.raises(UserError, match=r"vgg16-397923af\.pth.* put it into .*checkpoints"):
        likeness(grey(0), grey(51))


def test_bad_input_is_refused():
    with pytest.raises(UserError, match="differ in shape"):
        likeness(grey(0), grey(0, side=20))
    with pytest.raises(UserError, match="at least 11x11"):
        likeness(grey(0, side=10), grey(1, side=10))
    with pytest.raises(UserError, match="uint8"):
        likeness(grey(0) / 255, grey(0) / 255)
