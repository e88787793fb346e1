"""Folders for GenEval and DPG-Bench, read as their programs read them."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from students import student

from stepdistill import distributed
from stepdistill.cli import main
from stepdistill.errors import UserError
from stepdistill.evaluate import exporters
from stepdistill.evaluate.exporters import LAYOUTS, export_pictures
from stepdistill.evaluate.walks import sampler, student_walk

LINES = [{"tag": "colors", "include": [], "prompt": f"a {word} ring"} for word in ("red", "blue", "größer")]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return student(tmp_path_factory.mktemp("student"))


@pytest.fixture(autouse=True)
def restored(made, monkeypatch):
    monkeypatch.setattr(exporters, "restore", lambda run: made)


@pytest.fixture
def prompts(tmp_path):
    """By layout; the list has an empty line, which counts for nothing."""
    file, folder = tmp_path / "evaluation_metadata.jsonl", tmp_path / "prompts"
    file.write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in LINES), encoding="utf-8")
    folder.mkdir()
    for name, line in zip(("10", "9", "stanford3"), LINES, strict=True):  # in the order of names
        (folder / f"{name}.txt").write_text(line["prompt"] + "\n", encoding="utf-8")
    return {"geneval": file, "dpg": folder}


def expected(made, p: int) -> np.ndarray:
    """The four pictures of the p-th prompt, drawn by themselves."""
    return sampler(made, student_walk(made, made.inference(2)))([LINES[p]["prompt"]] * 4, 4 * p)


def files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_geneval_finds_each_line_beside_its_pictures(made, prompts, tmp_path):
    out = export_pictures(tmp_path, "geneval", prompts["geneval"], tmp_path / "out", 2)
    folders = sorted(place for place in out.iterdir() if place.is_dir())
    assert [place.name for place in folders] == ["00000", "00001", "00002"]
    for p, place in enumerate(folders):
        assert json.loads((place / "metadata.jsonl").read_text(encoding="utf-8")) == LINES[p]
        samples = sorted(path for path in (place / "samples").iterdir() if re.match(r"\d+\.png", path.name))
        assert [path.name for path in samples] == [f"{k:04d}.png" for k in range(4)]
        pictures = np.stack([np.asarray(Image.open(path)) for path in samples])
        assert np.array_equal(pictures, expected(made, p))
        assert (pictures[0] != pictures[1]).any()


def test_dpg_bench_cuts_four_pictures_out_of_a_grid(made, prompts, tmp_path):
    out = export_pictures(tmp_path, "dpg", prompts["dpg"], tmp_path / "out", 2)
    assert sorted(path.name for path in out.glob("*.png")) == ["10.png", "9.png", "stanford3.png"]
    for p, name in enumerate(("10", "9", "stanford3")):
        grid, side = Image.open(out / f"{name}.png"), made.family.size[0]
        assert grid.size == (2 * side, 2 * side)
        boxes = [(x, y, x + side, y + side) for y in (0, side) for x in (0, side)]  # in the benchmark's order
        assert np.array_equal(np.stack([np.asarray(grid.crop(box)) for box in boxes]), expected(made, p))


@pytest.mark.parametrize("name", LAYOUTS)
def test_stopped_and_continued_by_two_processes_the_files_are_the_same(made, prompts, tmp_path, monkeypatch, name):
    whole = files(export_pictures(tmp_path, name, prompts[name], tmp_path / "whole", 2))
    layout, out = LAYOUTS[name], tmp_path / "parts"
    drawn = []

    def stopped(place, entry, pictures):
        layout.write(place, entry, pictures)
        drawn.append(entry.name)
        if len(drawn) == 2:
            raise KeyboardInterrupt

    monkeypatch.setitem(LAYOUTS, name, layout._replace(write=stopped))
    with pytest.raises(KeyboardInterrupt):
        export_pictures(tmp_path, name, prompts[name], out, 2)
    assert (out / drawn[0]).exists() and not (out / drawn[1]).exists()  # nothing is there by half
    first, second, third = (entry.name for entry in layout.read(prompts[name]))
    monkeypatch.setattr(distributed, "world", lambda: 2)
    for rank in (1, 0):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        export_pictures(tmp_path, name, prompts[name], out, 2)
    assert drawn == [first, second, second, third]  # what was there was not drawn again
    assert files(out) == whole


def test_a_folder_of_other_pictures_is_refused(made, prompts, tmp_path):
    out = export_pictures(tmp_path, "geneval", prompts["geneval"], tmp_path / "out", 2)
    before = files(out)
    p = next(iter(made.roles.student.parameters()))
    with pytest.raises(UserError, match="other steps, weights"):
        export_pictures(tmp_path, "geneval", prompts["geneval"], out, 1)
    with pytest.raises(UserError, match="other layout, prompts"):
        export_pictures(tmp_path, "dpg", prompts["dpg"], out, 2)
    with torch.no_grad():
        p.mul_(2)
    with pytest.raises(UserError, match="other weights "):
        export_pictures(tmp_path, "geneval", prompts["geneval"], out, 2)
    with torch.no_grad():
        p.div_(2)  # exact
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds no pictures of this command"):
        export_pictures(tmp_path, "geneval", prompts["geneval"], tmp_path / "thesis", 2)
    assert files(out) == before


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("\n \n", "holds no prompt"),
        ('{"prompt": "a bench"}\n\n{"prompt": "a', r":3 must be a JSON object"),
        ('{"prompt": "a bench"}\n{"tag": "colors"}', r":2 must be a JSON object with a text at \"prompt\""),
        ('{"prompt": " "}', r":1 must be"),
        ('["a bench"]', r":1 must be"),
    ],
)
def test_a_wrong_list_is_told_with_its_line(tmp_path, text, told):
    (tmp_path / "list.jsonl").write_text(text)
    with pytest.raises(UserError, match=told):
        export_pictures(tmp_path, "geneval", tmp_path / "list.jsonl", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_prompts_names_and_sizes_are_told(made, prompts, tmp_path, monkeypatch):
    for name, given, told in [
        ("geneval", tmp_path / "absent", "cannot be read"),
        ("dpg", prompts["geneval"], "no folder of .txt files"),
        ("dpg", tmp_path / "empty", "no folder of .txt files"),
        ("dgp", prompts["dpg"], "did you mean 'dpg'"),
    ]:
        with pytest.raises(UserError, match=told):
            export_pictures(tmp_path, name, given, tmp_path / "out")
    (prompts["dpg"] / "v1.5.txt").write_text("a bench")
    with pytest.raises(UserError, match="name without points"):
        export_pictures(tmp_path, "dpg", prompts["dpg"], tmp_path / "out")
    (prompts["dpg"] / "v1.5.txt").write_text(" ")
    with pytest.raises(UserError, match="is empty"):
        export_pictures(tmp_path, "dpg", prompts["dpg"], tmp_path / "out")
    (prompts["dpg"] / "v1.5.txt").unlink()
    monkeypatch.setattr(made.family, "size", (32, 64))
    with pytest.raises(UserError, match="draws 64x32, but --folder dpg needs pictures of equal sides"):
        export_pictures(tmp_path, "dpg", prompts["dpg"], tmp_path / "out")
    monkeypatch.setattr(made.family, "frames", 5)
    with pytest.raises(UserError, match="makes videos"):
        export_pictures(tmp_path, "geneval", prompts["geneval"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_line_draws_them(prompts, tmp_path, capsys):
    command = ["eval", str(tmp_path), "--folder", "dpg", "--prompts", str(prompts["dpg"]), "--out", str(tmp_path / "out")]
    assert main([*command[:-2], "--steps", "1"]) == 2
    assert "--folder dpg needs --prompts" in capsys.readouterr().err
    assert main([*command, "--steps", "1"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.png"))) == 3
