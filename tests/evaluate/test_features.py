"""Feature networks: a stand-in of the FID network with known layers, a tiny CLIP, weights that are missing."""

import numpy as np
import pytest
import torch
from clips import package, pictures, save_clip
from torch import nn
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from stepdistill import extras
from stepdistill.errors import UserError
from stepdistill.evaluate import clip, features, resize
from stepdistill.evaluate.features import FEATURES, Fitted

CPU = torch.device("cpu")
NAME = "weights-inception-2015-12-05-6726825d.pth"


class Net(nn.Module):
    """The package's class, as far as it is used: layers by name, and one that must not run."""

    def __init__(self, name, features_list, feature_extractor_weights_path):
        super().__init__()
        self.AvgPool = nn.AdaptiveAvgPool2d((1, 1))  # first, for speed
        self.Conv2d_1a_3x3 = nn.Conv2d(3, 2048, 1)
        self.fc = nn.Linear(7, 7)
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=True))


@pytest.fixture
def place(monkeypatch, tmp_path):
    """A torch_fidelity whose weights belong into that file; the file is not there yet."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    package(monkeypatch, "torch_fidelity")
    url = f"file://{tmp_path}/elsewhere/{NAME}"
    module = "torch_fidelity.feature_extractor_inceptionv3"
    package(monkeypatch, module, URL_INCEPTION_V3=url, FeatureExtractorInceptionV3=Net)
    features.inception_net.cache_clear()
    yield tmp_path / "hub" / "checkpoints" / NAME
    features.inception_net.cache_clear()


@pytest.fixture
def weight(place):
    """[2048, 3] the only layer's; its bias is 0."""
    torch.manual_seed(0)
    weight = torch.randn(2048, 3)
    state = {"Conv2d_1a_3x3.weight": weight[..., None, None], "Conv2d_1a_3x3.bias": torch.zeros(2048)}
    place.parent.mkdir(parents=True)
    torch.save(state | {"fc.weight": torch.zeros(7, 7), "fc.bias": torch.zeros(7)}, place)
    return weight.numpy()


def test_inception_reads_clean_floats(weight):
    shown = pictures(3, 64, 90)
    net = FEATURES["inception"](CPU)
    colour = np.stack([resize.clean(one).mean((0, 1)) for one in shown])
    rows = net(shown)
    assert rows.shape == (3, net.dim) and rows.dtype == np.float32
    np.testing.assert_allclose(rows, (colour - 128) / 128 @ weight.T, atol=1e-4)
    assert "clean-fid" in net.filter and "2015-12-05" in net.name


def test_rows_depend_on_their_pictures_alone(weight, monkeypatch):
    net, shown = FEATURES["inception"](CPU), [*pictures(3, 40, 30), *pictures(2, 64, 64)]  # of several sizes
    whole = net(shown)
    monkeypatch.setattr(features, "BATCH", 2)
    np.testing.assert_allclose(net(shown), whole, atol=1e-5)
    np.testing.assert_allclose(net(shown[3:4]), whole[3:4], atol=1e-5)
    assert net([]).shape == (0, 2048)


def test_patch_sees_the_middle_only(weight):
    net, shown = FEATURES["inception-patch"](CPU), pictures(2, 301, 320)
    framed = np.zeros_like(shown)
    framed[:, 1:300, 10:309] = shown[:, 1:300, 10:309]
    assert np.array_equal(net(shown), net(framed))
    framed[:, 1] = 0
    assert not np.allclose(net(shown), net(framed))
    middle = shown[:, 1:300, 10:309].astype(float).mean((1, 2))
    np.testing.assert_allclose(net(shown), (middle - 128) / 128 @ weight.T, atol=1e-4)
    with pytest.raises(UserError, match="320x298 pixels has no patch of 299x299"):
        net(pictures(1, 298, 320))


def test_pictures_of_any_size_are_fitted_first(weight):
    net = FEATURES["inception"](CPU)
    fitted, shown = Fitted(net, 32), [pictures(1, 64, 100)[0], pictures(1, 50, 40)[0]]
    np.testing.assert_array_equal(fitted(shown), net(np.stack([resize.square(one, 32) for one in shown])))
    assert (fitted.name, fitted.dim) == (net.name, net.dim)
    assert fitted.filter == f"middle square, Lanczos to 32; {net.filter}"


def test_missing_weights_are_told_with_their_place(place):
    with pytest.raises(UserError) as told:
        FEATURES["inception"](CPU)
    assert f"place it at {place}" in str(told.value) and f"fetch file://{place.parents[2]}/elsewhere" in str(told.value)


def test_weights_with_another_hash_are_not_kept(place):
    source = place.parents[2] / "elsewhere" / NAME
    source.parent.mkdir()
    source.write_bytes(b"other")
    with pytest.raises(UserError, match="invalid hash value"):
        FEATURES["inception"](CPU)
    assert not place.exists()


def test_damaged_weights_are_told(weight, place):
    place.write_bytes(place.read_bytes()[:1000])
    with pytest.raises(UserError, match=f"{NAME} cannot be read; delete the file"):
        FEATURES["inception"](CPU)


def test_a_missing_package_is_told_with_its_extra(place, monkeypatch):
    monkeypatch.setattr(extras, "installed", lambda _name: False)
    with pytest.raises(UserError, match=r"features inception.*torch_fidelity.*pip install 'stepdistill\[eval\]'"):
        FEATURES["inception-patch"](CPU)


def test_clip_features_are_of_unit_norm_and_of_cmmds_view(tmp_path):
    source = save_clip(tmp_path)
    net, shown = features.clip_features(CPU, source), pictures(3, 48, 48)
    rows = net(shown)
    assert rows.shape == (3, net.dim) == (3, 16)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    with torch.no_grad():
        said = clip.load(source, CPU)[1].get_image_features(**processor(images=list(shown), return_tensors="pt"))
    wanted = nn.functional.normalize(said.pooler_output, dim=-1)  # of square pictures CMMD's view is CLIP's own
    np.testing.assert_allclose(rows, wanted, atol=1e-5)
    wide = np.concatenate([np.zeros((48, 20, 3), np.uint8), shown[0], np.zeros((48, 20, 3), np.uint8)], 1)
    np.testing.assert_allclose(net([wide]), rows[:1], atol=1e-5)
