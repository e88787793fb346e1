"""What a protocol asks of its user, and what it makes of prompts and a reference."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from stepdistill.cli import main
from stepdistill.errors import UserError
from stepdistill.evaluate import presets
from stepdistill.evaluate.measure import collect, figures, make
from stepdistill.evaluate.presets import OWN, PRESETS, Preset, find_preset, read_captions, suite
from stepdistill.show import Line
from stepdistill.tiny.world import draw, scenes

COCO = PRESETS["coco30k-sd15"]


def made(folder: Path, preset: Preset, prompts=None, reference=None, size=(64, 64), name="mine"):
    return suite(name, preset, prompts, reference, size, 0, torch.device("cpu"), folder / "cache", Line())


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(scene.caption for scene in scenes(70, 3, "all")))
    return file


def test_own_prompts_and_pictures_are_measured(tmp_path, prompts, monkeypatch):
    """The reference's own pictures are at distance 0 from it."""
    monkeypatch.setattr(presets, "EACH", 2)
    images = draw(scenes(70, 3, "all"), 3).images
    (tmp_path / "photos").mkdir()
    for k, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "photos" / f"{k:03d}.png")
    of = made(tmp_path, Preset(None, ("judge",)), prompts, str(tmp_path / "photos"))
    assert of.n == 70 and of.compared["groups"] == "32 prompts x 2"

    def sample(captions, first):
        return images[first : first + len(captions)] if first < 70 else np.resize(images, (len(captions), 64, 64, 3))

    make(sample, of, tmp_path / "kept")
    found = figures(of, collect(of, tmp_path / "kept"))
    assert found["fd"] == pytest.approx(0, abs=1e-3) and found["recall"] == 1 and found["n"] == 70
    assert "judge" in str(of.compared["features"]) and "reference" in str(of.compared["features"])


def test_without_a_reference_no_distance_is_taken(tmp_path, prompts):
    of = made(tmp_path, Preset(40, ("judge",)), prompts)
    assert [meter.name for meter in of.sets["plain"].meters] == ["colour", "shown"] and of.n == 40


@pytest.mark.parametrize(
    ("preset", "options", "said"),
    [
        (COCO, {"name": "coco30k-sd15"}, "sd15 needs --prompts FILE and --reference FOLDER: captions_val2014.*cocodataset"),
        (OWN, {}, "needs --prompts FILE of prompts"),
        (Preset(None, ("incepton",)), {"prompts": True}, "--features incepton is none; did you mean 'inception'"),
        (Preset(71, ("judge",)), {"prompts": True}, "--n 71 is more than the 70 prompts of"),
        (Preset(64, ("judge",)), {"prompts": True, "reference": "x"}, "64 pictures are too few .* at least 65"),
        (Preset(None, ("judge", "inception")), {"prompts": True, "reference": "x"}, "leave one out"),
        (COCO, {"prompts": True, "reference": "x"}, "512x512 pixels, but this run draws 64x64; set data.resolution to 512"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(tmp_path, prompts, preset, options, said):
    with pytest.raises(UserError, match=said):
        made(tmp_path, preset, **options | ({"prompts": prompts} if "prompts" in options else {}))


def test_unknown_preset():
    with pytest.raises(UserError, match="coco30k-sd5 is none; did you mean 'coco30k-sd15'"):
        find_preset("coco30k-sd5")


def test_of_coco_s_annotations_each_picture_has_its_first_caption(tmp_path):
    file = tmp_path / "captions_val2014.json"
    said = [(7, 2, "two"), (5, 1, "one, late"), (4, 1, " one "), (9, 2, "two, late")]
    rows = [{"id": own, "image_id": image, "caption": text} for own, image, text in said]
    file.write_text(json.dumps({"images": [], "annotations": rows}))
    assert read_captions(file) == ["one", "two"]
    for wrong in ("{", "[]", '{"annotations": [{"id": 1}]}', '{"annotations": []}'):
        file.write_text(wrong)
        with pytest.raises(UserError, match=r"captions_val2014.json holds no .*; give captions_val2014.json, or a text file"):
            read_captions(file)


def test_an_empty_list_of_prompts(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(UserError, match="empty"):
        read_captions(tmp_path / "empty.txt")


def test_every_network_keeps_rows_of_its_own():
    network, against = SimpleNamespace(name="any", filter="none"), SimpleNamespace(about={"hash": "0"})
    names = [presets.DISTANCES[word](network, against).name for word in ("inception", "inception-patch", "clip")]
    assert len(set(names)) == 3


@pytest.mark.parametrize("pair", [("inception", "judge"), ("clip-score", "clip-score-dmd2")])
def test_two_of_one_figure_are_refused(tmp_path, prompts, pair):
    with pytest.raises(UserError, match=f"{' and '.join(pair)} are told as one figure"):
        made(tmp_path, Preset(None, pair), prompts, "photos")


def patches(device, least=299):
    """Features that see a patch of pictures; of no weights."""
    see = lambda pictures: np.stack([one.mean((0, 1)) for one in pictures]).astype(np.float32)  # noqa: E731
    return type("Patch", (), {"name": "patch", "dim": 3, "filter": "none", "least": least, "__call__": lambda _, x: see(x)})()


def test_sizes_are_looked_at_before_any_feature_is_computed(tmp_path, prompts, monkeypatch):
    monkeypatch.setitem(presets.FEATURES, "inception-patch", patches)
    wanted = Preset(None, ("judge", "inception-patch"), square=64)
    with pytest.raises(UserError, match="this run draws 64x64 pixels, and patch FID compares 299x299"):
        made(tmp_path, wanted, prompts, str(tmp_path))
    (tmp_path / "photos").mkdir()
    for k, size in enumerate(((640, 299), (298, 640), (299, 299))):
        Image.new("RGB", size).save(tmp_path / "photos" / f"{k}.png")
    with pytest.raises(UserError, match=r"of the 3 pictures .* 1 \(1.png 298x640\) have an edge below the 299 pixels"):
        made(tmp_path, wanted, prompts, str(tmp_path / "photos"), size=(512, 512))
    assert not (tmp_path / "cache").exists()
    (tmp_path / "photos" / "1.png").unlink()
    of = made(tmp_path, wanted, prompts, str(tmp_path / "photos"), size=(512, 512))
    assert [meter.name for meter in of.sets["plain"].meters][:2] == ["features", "patch_features"]


@pytest.mark.parametrize("word", ["clip", "inception-patch"])
def test_moments_of_others_serve_no_other_network(tmp_path, prompts, word):
    with pytest.raises(UserError, match=f"--features {word}: them.npz holds moments of inception features"):
        made(tmp_path, Preset(None, ("inception", word)), prompts, "them.npz")


def test_help_names_all_that_can_be_measured(capsys):
    with pytest.raises(SystemExit):
        main(["eval", "--help"])
    said = capsys.readouterr().out.replace("\n", " ")
    assert [word for word in presets.FEATURE_WORDS if f" {word}" not in said] == []
