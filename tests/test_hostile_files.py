"""Sidecars, results, data sets and exports of others: read within limits, or refused by name (docs/security.md)."""

import io
import json
import os
import struct
import tarfile
import zlib
from pathlib import Path

import pytest
import torch
from hostile import serving
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from test_push import Hub

from stepdistill.data.folder import folder_pictures
from stepdistill.data.pairs import read_pairs
from stepdistill.data.picture import Picture, Skipped
from stepdistill.data.pictures import damage
from stepdistill.data.prompts import read_prompts
from stepdistill.data.shards import shard_pictures
from stepdistill.data.tables import table_pictures
from stepdistill.errors import UserError
from stepdistill.evaluate.references import look, opened
from stepdistill.export import figures_in
from stepdistill.families.spellings import read_layers
from stepdistill.foreign import DEPTH, read_json
from stepdistill.push import push
from stepdistill.report.pictures import embed
from stepdistill.report.read import read_figures, read_log
from stepdistill.sidecar import SIDECAR, Serving, read_export
from stepdistill.sources import check_pairs

DEEP = "[" * 100_000
TREE = json.loads(serving().to_json())
PLACES = [(*path,) for path in ([key] for key in TREE)] + [("samplers", "2", key) for key in TREE["samplers"]["2"]]
PLACES += [("lora", key) for key in TREE["lora"]] + [("files", "diffusers"), ("worn", 0), ("call", "guidance_scale")]


def changed(path, value):
    """The sidecar's tree with another value in one place."""
    tree = json.loads(json.dumps(TREE))
    at = tree
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return tree


def write(folder: Path, text: str | bytes) -> Path:
    (folder / SIDECAR).write_bytes(text.encode() if isinstance(text, str) else text)
    return folder


def test_a_sidecar_is_read(tmp_path):
    """So that those below are refused for what is wrong with them."""
    assert read_export(write(tmp_path, serving().to_json())) == serving()
    whole = serving(lora=None, files={"pipeline": ("pipeline",)}, frames=9, fps=8.0)
    assert read_export(write(tmp_path, whole.to_json())) == whole


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("format",), 4),
        (("more",), 1),
        (("name",), "../a"),
        (("name",), "a" * 70_000),
        (("pipeline",), "os.system"),
        (("pipeline",), 'X\nimport os; os.system("id")'),
        (("network",), "__class__"),
        (("network",), "unet; evil()"),
        (("strategy",), "`id`"),
        (("dtype",), "load"),
        (("size",), [0, 64]),
        (("size",), [64, 10**9]),
        (("size",), [64]),
        (("frames",), 16),
        (("fps",), 0),
        (("steps",), -1),
        (("steps",), 3),
        (("samplers",), {}),
        (("samplers",), {"two": {}}),
        (("samplers", "2", "scheduler"), "load_image"),
        (("samplers", "2", "scheduler"), ["LCMScheduler"]),
        (("samplers", "2", "config"), {"num_train_timesteps": 10**12}),
        (("samplers", "2", "call"), {"num_inference_steps": 10**9}),
        (("samplers", "2", "call"), {"num_inference_steps": {}}),
        (("samplers", "2", "students"), ["a b"]),
        (("samplers", "2", "comfyui"), {"cfg": "<script>"}),
        (("samplers", "2", "told"), "soon"),
        (("worn",), []),
        (("worn",), [["student"]]),
        (("call",), {"prompt": "another"}),
        (("call",), {"a=1) or evil(": 1}),
        (("call",), {"height": 10**9}),
        (("lora", "rank"), 10**9),
        (("lora", "loader"), "pickle"),
        (("lora", "targets"), "to_q"),
        (("prompts",), []),
        (("prompts",), [1]),
        (("prompts",), ["a" * 70_000]),
        (("versions",), {"a": 1}),
        (("recipe",), []),
        (("loras",), [{"place": "/", "file": "../a.safetensors"}]),
        (("loras",), [{"place": "org/name", "file": "a.bin"}]),
        (("quantize",), "int1"),
        (("files",), {"sh": ["a.safetensors"]}),
        (("files", "diffusers"), ["../../home/a.safetensors"]),
        (("files", "diffusers"), ["/etc/passwd"]),
        (("files", "diffusers"), ["a.bin"]),
        (("files", "diffusers"), [".env.safetensors"]),
        (("files", "diffusers"), ['a"; evil(); ".safetensors']),
        (("files",), {"fused": [".."]}),
    ],
)
def test_a_sidecar_that_lies_is_refused(tmp_path, path, value):
    with pytest.raises(UserError, match=rf"{SIDECAR} cannot be read: .*; export the run again") as caught:
        read_export(write(tmp_path, json.dumps(changed(path, value))))
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("text", [b"", b"\xff\xfe", DEEP, '{"format":' * 5000, " " * 5_000_000, "9" * 5000, "null", "NaN"])
def test_a_sidecar_that_is_no_json(tmp_path, text):
    with pytest.raises(UserError, match=SIDECAR):
        read_export(write(tmp_path, text))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.sampled_from(["../x", "a b", "1e999"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(PLACES), values)
def test_whatever_stands_in_a_sidecar_it_is_read_or_refused(path, value):
    try:
        told = Serving.from_json(json.dumps(changed(path, value)))
    except UserError:
        return
    assert isinstance(told.at(None).arguments, dict) and told.steps in told.samplers and told.prompts[0] is not None


def test_a_file_of_an_export_that_is_a_link_elsewhere(tmp_path):
    (tmp_path / "export").mkdir()
    (tmp_path / "secret.safetensors").write_bytes(b"mine")
    write(tmp_path / "export", serving().to_json())
    link = tmp_path / "export" / "pytorch_lora_weights.safetensors"
    os.symlink(tmp_path / "secret.safetensors", link)
    with pytest.raises(UserError, match="is a link that leaves the export"):
        read_export(tmp_path / "export")
    home = tmp_path / "models--org--name"  # in the hub's cache files lie beside
    (home / "blobs").mkdir(parents=True), (home / "snapshots").mkdir()
    (tmp_path / "secret.safetensors").rename(home / "blobs" / "a")
    cached = (tmp_path / "export").rename(home / "snapshots" / "0")
    link = cached / link.name
    link.unlink(), os.symlink("../../blobs/a", link)
    assert read_export(cached) == serving()


def test_json_has_limits(tmp_path):
    file = tmp_path / "a.json"
    for text in (
        DEEP,
        "[" * (DEPTH + 2) + "]" * (DEPTH + 2),
        '"' + "a" * 70_000 + '"',
        "[" + "1," * 200_000 + "1]",
        "9" * 5000,
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"deep|characters|entries|digits"):
            read_json(file)
    with pytest.raises(ValueError, match="longer than the 10 bytes"):
        read_json(file, 10)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="no such file"):  # and does not wait
        read_json(tmp_path / "pipe")


@pytest.mark.parametrize("about", [DEEP, "[]", '{"unet.alpha_pattern": 3}', '{"unet.lora_alpha": "x"}', "a" * 10**6])
def test_what_a_lora_says_of_itself(tmp_path, about):
    state = {f"unet.a.lora_{x}.weight": torch.zeros(2, 2) for x in "AB"}
    save_file(state, tmp_path / "a.safetensors", {"lora_adapter_metadata": about})
    with pytest.raises(UserError, match=r"a\.safetensors"):
        read_layers(tmp_path / "a.safetensors")


ROW = {"who": "student", "steps": 2, "fd": 1.0}
RIGHT = {"format": 1, "rows": [ROW | {"solver": "DDIM", "note": ["kept"]}], "provenance": {"compared": {}}}


@pytest.mark.parametrize(
    "made",
    [DEEP, "[]", RIGHT | {"rows": {}}, RIGHT | {"rows": [1]}, RIGHT | {"provenance": {"compared": []}}]
    + [RIGHT | {"rows": [ROW | odd]} for odd in ({"who": 1}, {"fd": "x"}, {"steps": []}, {"solver": {}}, {"ms_low": "<b>"})],
)
def test_results_that_are_none(tmp_path, made):
    file = tmp_path / "eval" / "tiny.json"
    file.parent.mkdir()
    file.write_text(made if isinstance(made, str) else json.dumps(made))
    with pytest.raises(UserError, match=r"tiny\.json holds no figures that this version reads"):
        read_figures(file)
    assert made != DEEP or figures_in(file) is None
    file.write_text(json.dumps(RIGHT))
    assert read_figures(file)["rows"][0]["fd"] == 1.0


def test_a_log_keeps_the_lines_that_are_ours(tmp_path):
    odd = [
        DEEP,
        "[1]",
        "3",
        '{"step": "1", "seconds": 1}',
        '{"step": 1, "seconds": null}',
        '{"step": 1, "seconds": 1, "a/b": {}}',
    ]
    lines = [*odd, '{"step": 1, "seconds": 2.0, "student/loss": 3.0}']
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    assert read_log(tmp_path / "log.jsonl") == ({"student/loss": ([1], [3.0])}, 2.0)


@pytest.mark.parametrize("made", [{"count": 10**18, "shard": 1}, {"count": "9", "shard": 1}, {"count": 1, "shard": 0}, {}, []])
def test_pairs_that_cannot_be(tmp_path, made):
    (tmp_path / "pairs.json").write_text(json.dumps({"format": 1, **made} if isinstance(made, dict) else made))
    assert "pairs.json cannot be read" in next(check_pairs(str(tmp_path), {}))
    with pytest.raises(UserError, match=r"pairs"):
        read_pairs(tmp_path)


def png(width: int, height: int) -> bytes:
    """The beginning of a picture that claims to be of that size; its pixels would be zeros."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")


def test_a_picture_of_ten_billion_pixels_is_not_decoded(tmp_path):
    (tmp_path / "a.png").write_bytes(png(100_000, 100_000))
    (tmp_path / "a.txt").write_text("a bomb")
    (picture,) = folder_pictures(tmp_path)
    assert "decompression bomb" in damage(picture) and embed(tmp_path / "a.png") is None
    for read in (look, opened):
        with pytest.raises(UserError, match=r"a\.png is no picture that can be read"):
            read(tmp_path / "a.png")


def members(*made: tuple[str, bytes, bytes, int | None, str]) -> bytes:
    """A tar of (name, data, type, size that it claims, where it links to)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data, kind, size, link in made:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, len(data) if size is None else size, link
            tar.addfile(info, io.BytesIO(data) if size is None else None)
            if size is not None:
                tar.offset = out.tell()
    return out.getvalue()


def test_members_of_a_shard(tmp_path):
    ok = io.BytesIO()
    Image.new("RGB", (4, 4)).save(ok, "PNG")
    plain, link, device = tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE
    files = [("a.png", ok.getvalue(), plain, None, ""), ("a.txt", b"fine", plain, None, "")]
    files += [(name, b"x", plain, None, "") for name in ("../b.png", "/etc/c.png", "..\\d.png", "C:/e.png", "f/../../g.png")]
    files += [("h.png", b"", link, None, "/etc/passwd"), ("h.txt", b"", link, None, "/etc/passwd")]
    files += [("i.png", b"", tarfile.LNKTYPE, None, "/etc/passwd"), ("j.png", b"", device, None, "")]
    files += [("k.png", b"x", plain, None, ""), ("k.json", DEEP[:60_000].encode(), plain, None, "")]
    files += [("l.png", b"x", plain, None, ""), ("l.txt", b"y" * 70_000, plain, None, "")]
    files += [("m" * 5000 + ".png", b"x", plain, None, "")]
    (tmp_path / "a.tar").write_bytes(members(*files))
    huge = members(("n.png", b"", plain, 10**13, ""), ("o.txt", b"", plain, 10**13, ""))
    (tmp_path / "b.tar").write_bytes(huge)
    (tmp_path / "c.tar").write_bytes(members(("p", b"", tarfile.XHDTYPE, 10**15, "")))
    found = list(shard_pictures(tmp_path))
    (picture,) = (one for one in found if isinstance(one, Picture))
    assert picture.caption == "fine" and picture.load().size == (4, 4)
    said = {one.name[:20]: one.reason for one in found if isinstance(one, Skipped)}
    for name in ("../b.png", "/etc/c.png", "..\\d.png", "C:/e.png", "f/../../g.png"):
        assert "leaves the shard's folder" in said[f"a.tar/{name}"]
    for name in ("h.png", "h.txt", "i.png", "j.png"):
        assert "a link or a device" in said[f"a.tar/{name}"]
    assert "deep" in said["a.tar/k.png"] and "longer than" in said["a.tar/l.png"]
    assert "larger than" in said["b.tar/n.png"] and "c.tar" in said


def test_captions_that_leave_their_folder(tmp_path):
    data, outside = tmp_path / "data", tmp_path / "outside"
    data.mkdir(), outside.mkdir()
    (outside / "secret.txt").write_text("mine")
    (outside / "metadata.jsonl").write_text('{"file_name": "x.png", "text": "mine"}')
    for name in "abcd":
        (data / f"{name}.png").write_bytes(b"picture")
    os.symlink(outside / "secret.txt", data / "a.txt")
    (data / "b.txt").write_text("y" * 70_000)
    lines = [
        {"file_name": "../outside/x.png", "text": "t"},
        {"file_name": "/etc/x.png", "text": "t"},
        {"file_name": 3, "text": "t"},
    ]
    lines += [{"file_name": "c.png", "text": "fine"}, {"file_name": "d.png", "text": ["t"]}]
    (data / "metadata.jsonl").write_text("\n".join([*map(json.dumps, lines), DEEP, "[]"]))
    (data / "in").mkdir()
    os.symlink(outside / "metadata.jsonl", data / "in" / "metadata.jsonl")
    found = list(folder_pictures(data))
    assert [one.caption for one in found if isinstance(one, Picture)] == ["fine"]
    said = {one.name: one.reason for one in found if isinstance(one, Skipped)}
    assert "leaves the folder" in said["a.png"] and "longer than" in said["b.png"] and "in/metadata.jsonl" in said
    assert all("file_name leaves the folder" in said[f"metadata.jsonl:{n}"] for n in (1, 2))
    assert {f"metadata.jsonl:{n}" for n in (3, 5, 6, 7)} <= said.keys()


def test_tables_that_leave_their_folder(tmp_path):
    """A saved data set names its tables; none of these is opened."""
    for n, names in enumerate((["../../x.arrow", "/etc/passwd"], [3], "x", DEEP)):
        place = tmp_path / str(n)
        place.mkdir()
        text = (
            names if isinstance(names, str) and names == DEEP else json.dumps({"_data_files": [{"filename": x} for x in names]})
        )
        (place / "state.json").write_text(text)
    (tmp_path / "1" / "state.json").write_text(json.dumps({"_data_files": [3]}))
    (tmp_path / "2" / "state.json").write_text(json.dumps({"_data_files": "x"}))
    assert ["leaves its folder" in one.reason for one in table_pictures(tmp_path)] == [True, True]


def test_prompts_that_are_nested(tmp_path):
    (tmp_path / "a.jsonl").write_text(DEEP)
    with pytest.raises(UserError, match=r"a.jsonl:1 is not a JSON object"):
        read_prompts(str(tmp_path / "a.jsonl"))


def test_a_push_follows_no_link_and_takes_nothing_hidden(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    out = tmp_path / "export"
    out.mkdir()
    told = serving(model="org/base", files={"diffusers": ("a.safetensors",)})
    save_file({"x": torch.zeros(1)}, out / "a.safetensors")
    write(out, told.to_json())
    (out / ".env").write_text("HF_TOKEN=hf_secret")
    api = Hub()
    push(out, "org/name", api=api)
    assert set(api.files) == {"a.safetensors", SIDECAR, "README.md"}
    assert not any(b"hf_secret" in data for data in api.files.values())
    (tmp_path / "id_rsa").write_text("mine")
    os.symlink(tmp_path / "id_rsa", out / "notes.txt")
    api = Hub()
    with pytest.raises(UserError, match=r"nothing is uploaded: .*notes.txt is a link"):
        push(out, "org/name", api=api)
    assert not api.done
    (out / "notes.txt").unlink()
    monkeypatch.setattr(api, "whoami", lambda: (_ for _ in ()).throw(RuntimeError("bad token hf_secret")))
    with pytest.raises(UserError, match=r"bad token \(token\)") as caught:
        push(out, "org/name", api=api)
    assert "hf_secret" not in str(caught.value)
