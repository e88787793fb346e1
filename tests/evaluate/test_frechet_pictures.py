"""The Frechet distance of drawings in the judge's features. Apart from the closed forms, for mutations run without weights."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from stepdistill.evaluate.frechet import bias, frechet, moments
from stepdistill.tiny.judge import load_judge, to_net
from stepdistill.tiny.make.judge import blurred
from stepdistill.tiny.world import draw, scenes

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def drawings():
    """(the judge's features of pictures, 320 drawings)."""
    judge = load_judge()
    return (lambda images: judge.features(to_net(images))), draw(scenes(320, 5), 5).images


def test_halves_of_one_set_are_near_zero(drawings):
    """Of one law: what is left is the bias, which falls as 1/n."""
    features, images = drawings
    rows = features(images)
    a, b = moments(rows[::2]), moments(rows[1::2])
    assert frechet(*a, *a) == pytest.approx(0, abs=1e-6)
    halves, quarters = frechet(*a, *b), frechet(*moments(rows[:160:2]), *moments(rows[1:160:2]))
    assert halves < 1.2 * (bias(a, b, 160) + bias(b, a, 160)) and 1.4 < quarters / halves < 3
    many = RNG.normal(size=(20_000, 8))
    assert frechet(*moments(many[::2]), *moments(many[1::2])) < 0.01


def test_distance_grows_with_blur_noise_and_a_shift_of_colour(drawings):
    features, images = drawings
    reference = moments(features(images))
    images = images[:96]
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    grain, red = np.random.default_rng(3).normal(size=images.shape), np.array([1.0, 0, 0])
    damaged = {
        "blur": lambda k: blurred(x, torch.full((len(x),), 1.1 * k)).permute(0, 2, 3, 1).numpy(),
        "noise": lambda k: images + 8 * k * grain,
        "colour": lambda k: images + 25 * k * red,
    }
    least = frechet(*moments(features(images)), *reference)
    for name, damage in damaged.items():
        pictures = [damage(k).round().clip(0, 255).astype(np.uint8) for k in (1, 2, 3)]
        found = [least, *(frechet(*moments(features(one)), *reference) for one in pictures)]
        assert all(b > 1.1 * a for a, b in pairwise(found)), (name, found)
