"""References: of folders of pictures made here, kept and read again, and what is refused."""

import hashlib
import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import processes
import pytest
import torch
from clips import pictures
from PIL import Image
from safetensors.torch import save_file

from stepdistill.errors import UserError
from stepdistill.evaluate import references, rows
from stepdistill.evaluate.features import Fitted
from stepdistill.evaluate.frechet import moments
from stepdistill.evaluate.references import load_reference, reference, save_reference
from stepdistill.show import Line


class Colours:
    """Features that are known: the mean colour of a picture. Counts the pictures that it has seen."""

    name, dim, filter, least = "mean colour", 3, "none", 1

    def __init__(self):
        self.seen = 0

    def __call__(self, pictures):
        self.seen += len(pictures)
        return np.stack([one.mean((0, 1)) for one in pictures]).astype(np.float32)


class World:
    """A folder of pictures, and how its reference is asked for."""

    def __init__(self, root):
        self.folder, self.cache, self.said = root / "pictures", root / "cache", io.StringIO()
        self.features, self.pictures = Colours(), pictures(9, 20, 30)
        (self.folder / "within").mkdir(parents=True)
        names = [f"{k}.png" for k in range(7)] + ["within/a.PNG", "within/b.webp"]
        for name, picture in zip(names, self.pictures, strict=True):
            Image.fromarray(picture).save(self.folder / name, lossless=True)
        (self.folder / "notes.txt").write_text("no picture")

    def ask(self, resolution=(20, 30), source=None, **kw):
        line = Line(self.said)
        return reference(source or self.folder, self.features, resolution, self.cache, line, **kw)


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def test_a_folder_becomes_features_in_the_order_of_names(world, monkeypatch):
    monkeypatch.setattr(references, "BATCH", 4)
    made = world.ask(count=9)
    wanted = world.pictures.mean((1, 2))
    np.testing.assert_allclose(made.features, wanted, rtol=1e-6)
    assert made.features.dtype == np.float32
    torch.testing.assert_close(made.moments.cov, torch.from_numpy(np.cov(made.features.T.astype(np.float64))))
    about = {name: made.about[name] for name in ("features", "filter", "resolution", "n")}
    assert about == {"features": "mean colour", "filter": "none", "resolution": "30x20", "n": 9}
    assert made.about["source"] == str(world.folder) and len(made.about["hash"]) == 64


def test_it_is_computed_once(world):
    first, second = world.ask(), world.ask()
    assert world.features.seen == 9
    assert "are known, in" in world.said.getvalue()
    np.testing.assert_array_equal(first.features, second.features)
    assert all(map(torch.equal, first.moments, second.moments)) and first.about == second.about


def test_what_changes_its_name_in_the_cache(world, tmp_path):
    first = world.ask()
    world.folder.rename(tmp_path / "moved")
    world.folder = tmp_path / "moved"
    assert world.ask().about["hash"] == first.about["hash"] and world.features.seen == 9  # wherever it lies
    world.features.filter = "other"
    assert world.ask().about["hash"] == first.about["hash"] and world.features.seen == 18
    world.features.filter, world.features.name = "none", "other"
    world.ask()
    assert world.features.seen == 27
    Image.fromarray(world.pictures[0]).save(world.folder / "1.png")
    other = world.ask()
    assert world.features.seen == 36 and other.about["hash"] != first.about["hash"]
    np.testing.assert_allclose(other.features[1], other.features[0])


def test_pictures_of_other_sizes(world):
    Image.fromarray(pictures(1, 25, 30)[0]).save(world.folder / "3.png")
    with pytest.raises(UserError, match=r"of the 9 pictures of .*pictures 1 \(3\.png 30x25\) do not have the 30x20"):
        world.ask()
    assert world.features.seen == 0  # refused before any work
    assert world.ask(None).about["resolution"] == "mixed"
    world.features = Fitted(world.features, 16)
    assert world.ask(None).about["filter"] == "middle square, Lanczos to 16; none"


def test_small_pictures_are_counted_and_named_before_any_work(world, monkeypatch):
    monkeypatch.setattr(references, "NAMED", 1)
    for name, size in (("2.png", (30, 19)), ("5.png", (18, 30)), ("6.png", (30, 10))):
        Image.new("RGB", size).save(world.folder / name)
    with pytest.raises(UserError, match=r"of the 9 .* 2 \(5\.png 18x30 and 1 more\) have an edge below the 19 pixels"):
        world.ask(None, least=19)
    assert world.features.seen == 0
    assert world.ask(None, least=10).about["n"] == 9


def test_what_an_interruption_left_is_not_computed_again(world, monkeypatch):
    monkeypatch.setattr(rows, "BLOCK", 4)
    really = references.opened
    monkeypatch.setattr(references, "opened", lambda path: pytest.fail("stopped") if path.name == "6.png" else really(path))
    with pytest.raises(pytest.fail.Exception):
        world.ask()
    monkeypatch.undo()
    assert world.features.seen == 4
    monkeypatch.setattr(rows, "BLOCK", 4)
    np.testing.assert_allclose(world.ask().features, world.pictures.mean((1, 2)), rtol=1e-6)
    assert world.features.seen == 9 and [file.suffix for file in world.cache.iterdir()] == [".safetensors"]


def share_of(folder, cache):
    """What one of several processes computes, and the features that it then has."""
    features, rows.BLOCK = Colours(), 2
    made = reference(folder, features, (20, 30), cache, Line(io.StringIO()))
    return features.seen, made.features.tolist(), made.about["n"]


def test_processes_share_the_pictures_out(world):
    told = processes.world(2, share_of, world.folder, world.cache)
    assert [seen for seen, *_ in told] == [5, 4]  # blocks 0, 2 and 4, the last of one picture; blocks 1 and 3
    for _, features, n in told:
        np.testing.assert_allclose(features, world.pictures.mean((1, 2)), rtol=1e-6)
        assert n == 9


@pytest.mark.parametrize("damage", [b"", b"\x89PNG nothing", None])
def test_a_damaged_picture_is_named(world, damage):
    path = world.folder / "within" / "a.PNG"
    path.write_bytes(path.read_bytes()[:400] if damage is None else damage)
    with pytest.raises(UserError, match=r"within/a\.PNG is no picture that can be read .*; mend it or take it away"):
        world.ask()
    assert not list(world.cache.glob("*.safetensors"))


def test_grey_and_palettes_are_colours(world):
    Image.fromarray(np.full((20, 30), 90, np.uint8)).save(world.folder / "0.png")
    Image.new("RGBA", (30, 20), (10, 20, 30, 0)).save(world.folder / "1.png")
    made = world.ask()
    np.testing.assert_array_equal(made.features[:2], [[90, 90, 90], [10, 20, 30]])


def test_too_few_and_too_many(world, tmp_path):
    with pytest.raises(UserError, match="holds 9 pictures, not the 10 asked for"):
        world.ask(count=10)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds 0 pictures \(\.bmp, .*at least 2"):
        world.ask(source=tmp_path / "empty")
    with pytest.raises(UserError, match="nothing is no folder of pictures"):
        world.ask(source=tmp_path / "nothing")


def test_a_saved_one_is_read_and_refused_by_its_fields(world, tmp_path):
    made, path = world.ask(), tmp_path / "saved.safetensors"
    save_reference(made, path)
    assert list(tmp_path.glob("*saved*")) == [path]  # nothing half written is left
    again = world.ask(source=path, count=9)
    np.testing.assert_array_equal(again.features, made.features)
    assert again.about == made.about
    with pytest.raises(UserError, match="resolution is '30x20', not '64x64'"):
        world.ask((64, 64), path)
    with pytest.raises(UserError, match="n is 9, not 8"):
        world.ask(source=path, count=8)
    world.features.name, world.features.filter = "other", "cubic"
    with pytest.raises(UserError, match="features is 'mean colour', not 'other'; filter is 'none', not 'cubic'"):
        world.ask(source=path)


def test_moments_alone(world, tmp_path):
    drawn = np.random.default_rng(0).normal(size=(50, 3))
    np.savez(tmp_path / "known.npz", mu=drawn.mean(0), sigma=np.cov(drawn.T))
    made = world.ask(source=tmp_path / "known.npz")
    assert made.features is None and made.about["filter"].startswith("unknown")
    for ours, theirs in zip(made.moments, moments(drawn), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert "warning" in world.said.getvalue() and "taken for mean colour, none" in world.said.getvalue()
    assert made.about["hash"] == hashlib.sha256((tmp_path / "known.npz").read_bytes()).hexdigest()
    save_reference(made, tmp_path / "known.safetensors")
    assert load_reference(tmp_path / "known.safetensors").features is None


def test_files_that_are_no_references(world, tmp_path):
    np.savez(tmp_path / "wide.npz", mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(UserError, match=r"\[5\] and \[5, 5\] features, but mean colour has 3"):
        world.ask(source=tmp_path / "wide.npz")
    np.savez(tmp_path / "other.npz", a=np.zeros(5))
    with pytest.raises(UserError, match="holds no moments mu and sigma"):
        world.ask(source=tmp_path / "other.npz")
    for name in ("damaged.npz", "damaged.safetensors"):
        (tmp_path / name).write_bytes(b"no such thing")
        with pytest.raises(UserError, match=name):
            world.ask(source=tmp_path / name)
    save_file({"x": torch.zeros(2)}, tmp_path / "net.safetensors")
    with pytest.raises(UserError, match="is no reference of stepdistill"):
        world.ask(source=tmp_path / "net.safetensors")


def test_work_ahead_is_in_order_and_bounded():
    begun = []

    def work(k):
        begun.append(k)
        return k * k

    with ThreadPoolExecutor(2) as pool:
        found = references.ahead(pool, work, range(100), most=3)
        assert next(found) == 0
        assert len(begun) <= 4
        assert list(found) == [k * k for k in range(1, 100)]
