"""Saturation, contrast and brightness of pictures that can be worked out."""

import numpy as np
import pytest

from stepdistill.errors import UserError
from stepdistill.evaluate import likeness
from stepdistill.evaluate.colour import COLOURS, colour
from stepdistill.tiny.world import draw, scenes


def flat(*rgb):
    return np.tile(np.array(rgb, dtype=np.uint8), (1, 8, 8, 1))


def halves(left, right):
    """Equal shares of two colours, in a checkerboard."""
    board = (np.indices((8, 8)).sum(0) % 2)[None, ..., None]
    return np.where(board, np.array(left, dtype=np.uint8), np.array(right, dtype=np.uint8))


@pytest.mark.parametrize(
    ("picture", "want"),
    [
        (flat(51, 51, 51), (0, 0, 0.2)),
        (flat(255, 0, 0), (0.3 * np.hypot(1, 0.5), 0, 0.299)),
        (flat(0, 255, 0), (0.3 * np.hypot(1, 0.5), 0, 0.587)),
        (flat(0, 0, 255), (0.3, 0, 0.114)),
        (halves((255,) * 3, (0,) * 3), (0, 0.5, 0.5)),
        (halves((255, 0, 0), (0, 255, 0)), (1 + 0.3 * 0.5, (0.587 - 0.299) / 2, (0.587 + 0.299) / 2)),
        (halves((255, 255, 0), (0, 0, 255)), (1.0, (0.886 - 0.114) / 2, 0.5)),
    ],
)
def test_pictures_that_can_be_worked_out(picture, want):
    assert COLOURS == ("saturation", "contrast", "brightness")
    assert colour(picture)[0] == pytest.approx(want, abs=1e-6)


def test_stronger_colours_are_seen_in_saturation_alone():
    images = draw(scenes(30, 7), 7).images
    luma = images @ np.array([0.299, 0.587, 0.114])
    found = []
    for k in (0, 0.6, 1, 1.4):
        mixed = luma[..., None] + k * (images - luma[..., None])
        found.append(colour(mixed.round().clip(0, 255).astype(np.uint8)))
    means = np.mean(found, axis=1)
    assert means[0, 0] < 0.01 and np.all(np.diff(means[:, 0]) > 0.02)
    np.testing.assert_allclose(means[:, 1:], means[[0], 1:].repeat(4, axis=0), rtol=0.05)


def test_blocks_change_nothing_and_no_pictures_give_none(monkeypatch):
    x = np.random.default_rng(1).integers(0, 256, size=(7, 8, 8, 3), dtype=np.uint8)
    whole = colour(x)
    monkeypatch.setattr(likeness, "PIXELS", 3 * 64)
    np.testing.assert_allclose(colour(x), whole, rtol=1e-12)
    assert colour(x[:0]).shape == (0, 3)


def test_bad_input_is_refused():
    with pytest.raises(UserError, match="uint8"):
        colour(np.zeros((2, 8, 8, 3)))
    with pytest.raises(UserError, match="uint8"):
        colour(np.zeros((8, 8, 3), dtype=np.uint8))
