"""Rewards by stand-ins of their packages: what each is shown, and what is said where they are missing."""

import types

import clips
import numpy as np
import pytest
import torch
from clips import package, pictures
from PIL import Image
from torch import nn

from stepdistill import extras
from stepdistill.errors import UserError
from stepdistill.evaluate import clip, rewards

CPU = torch.device("cpu")


class Net(nn.Module):
    """Pictures and words become three numbers each."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def encode_image(self, x):
        assert x.shape[1:] == (3, 224, 224)
        mean, std = (torch.tensor(values)[:, None, None] for values in (clip.MEAN, clip.STD))
        return (x * std + mean).mean((2, 3)) * self.scale

    def encode_text(self, x):
        return x


@pytest.fixture
def open_clip(monkeypatch):
    with clips.open_clip(monkeypatch, lambda model, pretrained, **kw: (Net(), None, None)):
        yield


def test_hps_is_the_cosine_of_the_tuned_network(open_clip, monkeypatch):
    tuned = {"state_dict": {"scale": torch.tensor([1.0, 2.0, 1.0])}}
    monkeypatch.setattr(rewards, "hub_state", lambda what, *where: tuned if where[0] == "xswu/HPSv2" else None)
    shown = np.zeros((2, 60, 100, 3), np.uint8)
    shown[..., 0], shown[..., 1] = 100, 100
    shown[:, :, :19] = shown[:, :, -19:] = 255  # beyond the middle square
    found = rewards.REWARDS["hps"](CPU)(shown, ["red", "green"])
    np.testing.assert_allclose(found, [1 / 5**0.5, 2 / 5**0.5], atol=1e-4)


def test_hps_view_is_not_rounded():
    board = np.repeat(255 * (np.indices((448, 448)).sum(0) % 2)[..., None], 3, 2).astype(np.uint8)
    view = rewards.hps_view(board)
    assert view.shape == (3, 224, 224)
    torch.testing.assert_close(view[:, 4:-4, 4:-4], torch.full((3, 216, 216), 127.5), atol=1e-3, rtol=0)
    board = np.repeat(255 * (np.indices((672, 672)).sum(0) % 2)[..., None], 3, 2).astype(np.uint8)
    assert (rewards.hps_view(board)[:, 4:-4, 4:-4] - 127.5).abs().max() < 20  # every third pixel would be 0 or 255


def test_hps_without_its_weights(open_clip):
    with pytest.raises(UserError, match=r"HPSv2.1 needs the weights xswu/HPSv2/HPS_v2.1_compressed.pt.*hf download xswu/HPSv2"):
        rewards.REWARDS["hps"](CPU)


def test_image_reward_reads_each_picture_and_its_prompt(monkeypatch):
    def score(prompt, path):
        with Image.open(path) as picture:
            return float(np.asarray(picture).mean()) + 1000 * len(prompt)

    loaded = []
    package(monkeypatch, "ImageReward", load=lambda name, device: loaded.append(name) or types.SimpleNamespace(score=score))
    shown = pictures(3)
    found = rewards.REWARDS["image-reward"](CPU)(shown, ["a", "bb", "ccc"])
    np.testing.assert_allclose(found, shown.mean((1, 2, 3)) + 1000 * np.arange(1, 4), rtol=1e-6)
    assert loaded == ["ImageReward-v1.0"] and found.dtype == np.float32
    with pytest.raises(ValueError, match="3 pictures and 1 prompts"):
        rewards.REWARDS["image-reward"](CPU)(shown, ["a"])


def test_image_reward_that_is_not_there(monkeypatch):
    def load(name, device):
        raise OSError("offline")

    package(monkeypatch, "ImageReward", load=load)
    with pytest.raises(UserError, match=r"needs ImageReward.pt .* hf download THUDM/ImageReward .*--local-dir .*/ImageReward;"):
        rewards.REWARDS["image-reward"](CPU)
    monkeypatch.setattr(extras, "installed", lambda _name: False)
    with pytest.raises(UserError, match=r"image-reward needs the package ImageReward.*pip install 'stepdistill\[rewards\]'"):
        rewards.REWARDS["image-reward"](CPU)
