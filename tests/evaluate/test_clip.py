"""CLIP scores: against torchmetrics on a tiny network, and by a stand-in of open_clip whose embeddings are known."""

import types

import clips
import numpy as np
import pytest
import torch
import transformers
from clips import pictures, save_clip
from torch import nn
from torchmetrics.multimodal import CLIPScore
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from stepdistill import extras
from stepdistill.errors import UserError
from stepdistill.evaluate import clip

CPU = torch.device("cpu")
PROMPTS = ["a red cat", "a dog", "", "seven blue circles on sand, " * 2]


@pytest.fixture(scope="module")
def score(tmp_path_factory):
    return clip.ClipScore(CPU, save_clip(tmp_path_factory.mktemp("clip")))


class Bare(nn.Module):
    """A CLIP whose features are plain tensors, as torchmetrics wants them."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, x):
        return self.model.get_image_features(x).pooler_output

    def get_text_features(self, ids, mask):
        return self.model.get_text_features(ids, mask).pooler_output


def test_equals_torchmetrics(score):
    image = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})

    def processor(text=None, images=None, **kw):
        return image(images=images, return_tensors="pt") if text is None else score.tokenizer(text, **kw)

    metric = CLIPScore(lambda: (Bare(score.model), processor))
    for seed in (0, 2):
        shown = pictures(4, 50, 40, seed)
        with torch.no_grad():
            metric.update(torch.from_numpy(shown).permute(0, 3, 1, 2), PROMPTS)
        wanted = float(metric.compute())
        assert wanted > 1  # not the floor
        assert clip.percent(score(shown, PROMPTS)) == pytest.approx(wanted, rel=1e-4)
        metric.reset()


def test_percent_is_cut_at_zero_after_the_mean():
    assert clip.percent(np.array([0.5, -0.3], np.float32)) == pytest.approx(10)
    assert clip.percent(np.array([0.1, -0.3], np.float32)) == 0


def test_a_score_depends_on_its_own_picture_and_prompt_alone(score, monkeypatch):
    shown = pictures(5)
    prompts = [*PROMPTS, "a bird"]
    whole = score(shown, prompts)
    monkeypatch.setattr(clip, "BATCH", 2)
    np.testing.assert_allclose(score(shown, prompts), whole, atol=2e-6)
    np.testing.assert_allclose(score(shown[3:4], prompts[3:4]), whole[3:4], atol=2e-6)
    assert whole.dtype == np.float32 and np.abs(whole).max() <= 1 and np.ptp(whole) > 0.05
    assert score(shown[:0], []).shape == (0,)


def test_long_prompts_are_cut_and_keep_their_end(score):
    long = score.hear(["a cat " * 60, "a dog " * 60, "a cat " * 60 + "of glass"])
    assert torch.equal(long[0], long[2])
    assert (long[0] - long[1]).abs().max() > 1e-3  # without the end token all would be what the start token sees


def test_pictures_and_prompts_must_match(score):
    with pytest.raises(ValueError, match="2 pictures and 1 prompts"):
        score(pictures(2), ["a cat"])


def test_weights_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match=r"hf download openai/clip-vit-large-patch14, .*models--openai--clip-vit-large-patch14"):
        clip.ClipScore(CPU)
    transformers.CLIPTextConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="save the model there again"):
        clip.ClipScore(CPU, str(tmp_path))


class Colours(nn.Module):
    """Pictures become their mean colour; words the colours that they name."""

    encode_image = staticmethod(lambda x: x)
    encode_text = staticmethod(lambda x: x)


@pytest.fixture
def open_clip(monkeypatch):
    heard, seen = [], []

    def preprocess(picture):
        seen.append(picture.size)
        return torch.tensor(np.asarray(picture), dtype=torch.float32).mean((0, 1))

    def create(model, pretrained, precision, device):
        assert precision == "fp32" and str(device) == "cpu"
        if pretrained == "laion2b_s12b_b42k":
            raise RuntimeError("offline")
        return Colours(), None, preprocess

    known = {"laion2b_s12b_b42k": {"hf_hub": "laion/g/"}, "some": {"hf_hub": "org/some/"}}
    with clips.open_clip(monkeypatch, create, heard, known):
        yield types.SimpleNamespace(heard=heard, seen=seen)


def test_dmd2_says_its_prefix_and_sees_256_pixels(open_clip):
    score = clip.OpenClipScore(CPU, "ViT", "some")
    shown = np.zeros((3, 60, 100, 3), np.uint8)
    shown[..., 0] = 200
    shown[:, :, :20] = shown[:, :, -20:] = (0, 0, 255)  # what the middle square leaves out
    np.testing.assert_allclose(score(shown, ["red", "green", "red and blue"]), [1, 0, 0.5**0.5], atol=1e-6)
    assert open_clip.heard == ["A photo depicts red", "A photo depicts green", "A photo depicts red and blue"]
    assert set(open_clip.seen) == {(256, 256)}
    assert "ViT some" in score.name and "256" in score.filter


def test_open_clip_that_is_not_there(open_clip, monkeypatch):
    with pytest.raises(UserError, match="knows no weights other of ViT"):
        clip.OpenClipScore(CPU, "ViT", "other")
    with pytest.raises(UserError, match=r"needs the weights laion/g, .*offline.*hf download laion/g"):
        clip.OpenClipScore(CPU)
    with (
        pytest.raises(UserError, match="installed but does not import"),
        extras.importing("open_clip", "CLIP score"),
    ):
        raise RuntimeError("torchvision::nms does not exist")
    monkeypatch.setattr(extras, "installed", lambda _name: False)
    clip.load_open.cache_clear()
    with pytest.raises(UserError, match=r"not installed; install it: pip install 'stepdistill\[eval\]'"):
        clip.OpenClipScore(CPU)
