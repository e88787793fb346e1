"""Pictures of every kind of source: those that can be used are, the others are counted, listed, and no reason to stop."""

from __future__ import annotations

import io
import json
import sys
import tarfile

import numpy as np
import pytest
import torch
from counting import Family
from PIL import Image

from stepdistill.data.cache import Cache, Memory
from stepdistill.data.picture import Picture, Skipped, fit
from stepdistill.data.pictures import read, read_pictures, store_pictures
from stepdistill.data.tables import opened
from stepdistill.errors import UserError
from stepdistill.show import Line

RED, BLUE = [1.0, -1, -1], [-1.0, -1, 1]


def file(colour, kind="PNG", **how):
    """The bytes of a picture file."""
    out = io.BytesIO()
    Image.new("RGB", (30, 20), colour).save(out, kind, **how)
    return out.getvalue()


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "pictures"
    made.mkdir()
    return made


def stored(folder, store=None, family=None):
    """Captions, latents, and what was said."""
    said = io.StringIO()
    captions, latents = store_pictures(
        family or Family(), [(16, 16)], read_pictures(str(folder)), store or Memory(), "here", Line(said)
    )
    return captions, latents[range(len(captions))].tolist(), said.getvalue()


def names(folder, kind):
    return [one.name for one in read_pictures(str(folder)) if isinstance(one, kind)]


def test_a_folder_with_captions_beside_its_pictures_or_in_its_metadata(folder):
    for name, colour in (("b", "blue"), ("a", "red"), ("deep/c", "blue")):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.png").write_bytes(file(colour))
    (folder / "a.txt").write_text("all red\n")
    (folder / "b.txt").write_text("not this one")
    (folder / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "all blue"}\n')
    (folder / "deep" / "metadata.jsonl").write_text('\n{"file_name": "c.png", "prompt": "blue again"}\n{"file_name": "d')
    captions, latents, said = stored(folder)
    assert captions == ["all red", "all blue", "blue again"] and latents == [RED, BLUE, BLUE]
    assert "1 of 4 pictures of here are left out; the first: deep/metadata.jsonl:3 is no file_name with a text" in said


def test_what_cannot_be_used_is_listed_and_the_rest_is_used(folder, tmp_path):
    whole = file("red")
    for name, data, caption in (("a", whole, "red"), ("b", whole[:60], "cut"), ("c", b"no picture", "none"), ("d", whole, " ")):
        (folder / f"{name}.png").write_bytes(data)
        (folder / f"{name}.txt").write_text(caption)
    (folder / "e.png").write_bytes(whole)
    for _again in range(2):  # also when all that can be is encoded
        store = Cache(tmp_path / "cache", "pictures", {}, Line(io.StringIO()))
        captions, latents, said = stored(folder, store)
        assert captions == ["red"] and latents == [RED]
        assert "4 of 5 pictures of here are left out; the first: d.png has no caption" in said and "skipped.txt" in said
        listed = (store.folder / "skipped.txt").read_text().splitlines()
        assert [line.split(": ")[0] for line in listed] == ["d.png", "e.png", "b.png", "c.png"]
        assert all("is damaged (" in line for line in listed[2:])
    (folder / "a.png").unlink()
    with pytest.raises(UserError, match=r"here: none of its 4 pictures can be used; the first: d\.png has no caption"):
        stored(folder, store)


def test_a_changed_picture_is_another_one(folder, tmp_path):
    (folder / "a.png").write_bytes(file("red"))
    (folder / "a.txt").write_text("it")
    store = Cache(tmp_path / "cache", "pictures", {}, Line(io.StringIO()))
    assert stored(folder, store)[1] == [RED]
    (folder / "a.png").write_bytes(file("blue", compress_level=0))
    assert stored(folder, store)[1] == [BLUE]


def test_a_picture_stands_as_its_camera_was_held(folder):
    picture = Image.new("RGB", (32, 16), "red")
    picture.paste("blue", (16, 0, 32, 16))
    exif = picture.getexif()
    exif[274] = 6  # turned clockwise when it is shown
    picture.save(folder / "a.png", exif=exif)
    (folder / "a.txt").write_text("it")
    (one,) = read_pictures(str(folder))
    pixels = read(one, [(32, 16)])
    assert pixels[:16, :, 0].min() == 255 and pixels[16:, :, 2].min() == 255


def tar(path, members):
    with tarfile.open(path, "w") as out:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))


def test_shards_are_read_in_place_and_nothing_leaves_its_folder(folder):
    red, blue = file("red", "JPEG", quality=100), file("blue")
    told = json.dumps({"caption": "all blue"}).encode()
    tar(folder / "1.tar", {"x.jpg": red, "x.txt": b"all red\n", "in/y.json": told, "in/y.png": blue, "note.md": b"?"})
    tar(folder / "2.tar", {"../../z.png": blue, "../../z.txt": b"out", "bare.png": blue, "bad.png": b"?", "bad.txt": b"bad"})
    captions, latents, said = stored(folder)
    assert captions == ["all red", "all blue"] and latents[1] == BLUE
    assert np.allclose(latents[0], RED, atol=0.02)
    assert "4 of 6 pictures" in said and "2.tar/../../z.png is refused: its path leaves the shard's folder" in said
    assert names(folder, Skipped) == ["2.tar/../../z.png", "2.tar/../../z.txt", "2.tar/bare.png"]


def test_a_shard_that_is_cut_short_is_used_as_far_as_it_goes(folder):
    red = file("red")
    tar(folder / "a.tar", {"x.png": red, "x.txt": b"red", "y.png": red, "y.txt": b"lost"})
    whole = (folder / "a.tar").read_bytes()
    (folder / "a.tar").write_bytes(whole[: 2 * 1024 + 700])  # in the middle of y.png
    (folder / "b.tar").write_bytes(b"no shard at all" * 100)
    captions, latents, said = stored(folder)
    assert captions == ["red"] and latents == [RED] and "left out" in said
    assert {"a.tar/y.png", "b.tar"} <= set(names(folder, Skipped))


def test_tables_hold_pictures_and_captions(folder, pyarrow, monkeypatch):
    pyarrow({"image": [file("red"), file("blue"), b"?", file("red")], "text": ["red", "blue", "bad", None]})
    (folder / "data.parquet").touch()
    captions, latents, said = stored(folder)
    assert captions == ["red", "blue"] and latents == [RED, BLUE]
    assert "2 of 4 pictures" in said and "data.parquet:3 has no caption" in said
    pyarrow({"text": ["no pictures"]})
    with pytest.raises(UserError, match=r"is damaged, or no table of pictures \(no column of pictures, only text\)"):
        stored(folder)
    opened.cache_clear()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"^Parquet and Arrow files are read by pyarrow, which is not installed: pip install"):
        stored(folder)


def test_drawings_come_at_the_wanted_size_and_do_not_depend_on_their_number():
    many, few = list(read_pictures("stepdistill/tiny", 70)), list(read_pictures("stepdistill/tiny", 3))
    assert len(many) == 70 and [one[:3] for one in many[:3]] == [one[:3] for one in few]
    for one, other in zip(few, many[:3], strict=True):
        assert read(one, [(32, 24)]).shape == (32, 24, 3)
        np.testing.assert_array_equal(read(one, [(32, 32)]), read(other, [(32, 32)]))


def test_at_most_so_many_pictures(folder):
    for name in "abc":
        (folder / f"{name}.png").write_bytes(file("red"))
        (folder / f"{name}.txt").write_text(name)
    assert [one.caption for one in read_pictures(str(folder), 2)] == ["a", "b"]
    assert all(isinstance(one, Picture) for one in read_pictures(str(folder)))


@pytest.mark.parametrize("size", [(64, 32), (32, 64), (37, 91), (16, 16)])
def test_fit_keeps_the_centre(size):
    assert fit(Image.new("RGB", size, "white"), (16, 24)).shape == (16, 24, 3)
    wide = Image.new("RGB", (48, 16), "black")
    wide.paste("white", (16, 0, 32, 16))
    assert (fit(wide, (16, 16)) == 255).all()


def test_pixels_reach_the_autoencoder_in_minus_one_to_one(folder):
    (folder / "a.png").write_bytes(file((0, 51, 255)))
    (folder / "a.txt").write_text("it")
    torch.testing.assert_close(torch.tensor(stored(folder)[1]), torch.tensor([[-1.0, -0.6, 1.0]]))
