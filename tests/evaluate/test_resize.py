"""Resizing against closed forms: constants, ramps, checkerboards, and the filter's own weights."""

import math

import numpy as np
import pytest
from PIL.Image import Resampling
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from stepdistill.evaluate.resize import centre, clean, clip_view, square


def picture(rows):
    """[H, W] -> uint8 [H, W, 3], its channels x, 255 - x and x / 2."""
    rows = np.asarray(rows, np.float64)
    return np.stack([rows, 255 - rows, rows // 2], -1).astype(np.uint8)


def weights(wide, size):
    """[size, wide]: the cubic kernel with a = -1/2 (Keys 1981), stretched to the output's pixels, where it shrinks."""
    scale = wide / size
    places = (np.arange(size)[:, None] + 0.5) * scale - 0.5 - np.arange(wide)  # [size, wide]
    x = np.abs(places) / max(scale, 1)
    w = np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))
    return w / w.sum(1, keepdims=True)


@pytest.mark.parametrize("shape", [(20, 31), (64, 64), (400, 333)])
def test_clean_is_the_cubic_kernel_on_each_channel(shape):
    x = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
    tall, wide = weights(shape[0], 299), weights(shape[1], 299)
    wanted = np.einsum("ah,hwc,bw->abc", tall, x.astype(np.float64), wide, optimize=True).clip(0, 255)
    made = clean(x)
    assert made.dtype == np.float32 and made.shape == (299, 299, 3)
    np.testing.assert_allclose(made, wanted, atol=2e-3)


@pytest.mark.parametrize("wide", [30, 299, 900])
def test_a_constant_stays_and_a_ramp_stays_a_ramp(wide):
    np.testing.assert_allclose(clean(picture(np.full((40, wide), 38)))[..., 1], 217, atol=1e-4)
    ramp = np.broadcast_to(np.arange(wide) * 255 // wide, (40, wide)) if wide > 255 else np.tile(np.arange(wide) * 8, (40, 1))
    exact = (np.arange(299) + 0.5) * wide / 299 - 0.5  # where the outputs' centres lie in the input
    inside = slice(40, -40)
    slope = 255 / wide if wide > 255 else 8
    error = clean(picture(ramp))[150, inside, 0] - slope * exact[inside]
    assert np.abs(error).max() < (1.0 if wide > 255 else 1e-3)  # whole numbers of the input are up to 1 below the line


def test_a_fine_checkerboard_becomes_grey_and_is_not_rounded():
    board = picture(255 * (np.indices((598, 598)).sum(0) % 2))
    made = clean(board)[4:-4, 4:-4]
    np.testing.assert_allclose(made[..., :2], 127.5, atol=1e-3)  # points of it would be 0 or 255, rounded grey 127 or 128


def test_what_overshoots_is_cut():
    edge = picture(np.repeat([0, 255], 20)[None].repeat(40, 0))
    made = clean(edge)[..., 0]
    assert made.min() == 0 and made.max() == 255
    assert (weights(40, 299) @ np.repeat([0, 255], 20)).max() > 260


def test_the_middle():
    rows = picture(np.add.outer(10 * np.arange(5), np.arange(8)))
    assert centre(rows, 5, 5)[0, 0, 0] == 2  # 1.5 is rounded to even
    assert centre(rows, 2, 8)[0, 0, 0] == 20 and centre(rows, 2, 8, math.floor)[0, 0, 0] == 10
    assert centre(rows, 5, 8).shape == (5, 8, 3)
    wide = picture(np.repeat([0, 100, 200], [7, 20, 7])[None].repeat(20, 0))
    assert set(np.unique(square(wide, 10)[..., 0])) == {100}  # the sides are not squeezed into it
    assert square(wide, 10).dtype == np.uint8


def test_lanczos_is_not_bicubic():
    x = np.random.default_rng(1).integers(90, 166, (64, 64, 3)).astype(np.uint8)  # nothing is cut
    kernel = np.sinc(p := (np.arange(32)[:, None] + 0.5) - 0.25 - np.arange(64) / 2) * np.sinc(p / 3) * (np.abs(p) < 3)
    kernel /= kernel.sum(1, keepdims=True)
    wanted = np.einsum("ah,hwc,bw->abc", kernel, x.astype(np.float64), kernel, optimize=True)
    assert np.abs(square(x, 32).astype(float) - wanted).max() < 1.6  # of a picture rounded twice
    assert np.abs(square(x, 32, Resampling.BICUBIC).astype(float) - wanted).max() > 2.5


@pytest.mark.parametrize("shape", [(40, 40), (40, 44), (37, 90), (91, 64)])
def test_clip_sees_what_its_processor_shows_it(shape):
    x = np.random.default_rng(2).integers(0, 256, (*shape, 3)).astype(np.uint8)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30})
    shown = processor(images=[x], do_normalize=False, return_tensors="np")["pixel_values"][0]  # [3, 30, 30] in [0, 1]
    np.testing.assert_array_equal(clip_view(x, 30).transpose(2, 0, 1), np.round(255 * shown))
