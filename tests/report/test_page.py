"""The report as its reader gets it: one valid file that loads nothing, and says what is there and what is not."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image
from runs_on_disk import HOSTILE, PROMPTS, PROVENANCE, STUDENT, TEACHER, bare, drawn, export, log, measured, whole

from stepdistill.cli import main
from stepdistill.errors import UserError
from stepdistill.report.page import duration, write

VOID = {"meta", "link", "img", "input", "br"}


class Page(HTMLParser):
    """Every element with its attributes, and the text; fails where tags do not balance."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open, self.found, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.text += data

    def all(self, tag, **wanted):
        return [found for name, found in self.found if name == tag and wanted.items() <= found.items()]


def page(*folders, out=None) -> Page:
    return Page(write(folders, out).read_text(encoding="utf-8"))


@pytest.fixture
def run(tmp_path):
    return whole(tmp_path / "quick")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, and its page."""
    run = whole(tmp_path_factory.mktemp("runs") / "quick")
    return run, page(run)


def test_a_finished_run(finished):
    run, made = finished
    path = run / "report.html"
    assert path.stat().st_size < 200_000
    assert [
        text for text in ("Figures", "Pictures", "Training", "Use it", "Recipe", "Provenance") if text not in made.text
    ] == []
    for part in ("2.25", "student at 205", "student/matching", "how far apart the two scores are", "student_lr: 0.001"):
        assert part in made.text
    assert f"stepdistill.load_pipeline({json.dumps(str(run))})" in made.text and "pipe.load_lora_weights" in made.text
    assert "notes" not in [found.get("class") for _, found in made.found]  # nothing is missing
    assert not list(run.glob(".report*"))


def test_the_page_loads_nothing_and_each_id_is_one_element_s(finished):
    run, made = finished
    for tag, found in made.found:
        for name in ("src", "href", "xlink:href", "action", "data"):
            assert re.match(r"data:|#", found.get(name, "#")), (tag, name)
        assert "@import" not in str(found) and not re.search(r"url\((?!#)", str(found))
    style = re.findall(r"<style.*?</style>", (run / "report.html").read_text(), re.DOTALL)
    assert not any("url(" in text or "@import" in text for text in style) and len(style) == 1 + len(made.all("svg"))
    ids = [found["id"] for _, found in made.found if "id" in found]
    assert len(ids) == len(set(ids)) > 10
    targets = {found["href"] for found in made.all("a")} | {"#" + found["for"] for found in made.all("label")}
    assert targets <= {f"#{name}" for name in ids}
    (policy,) = made.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy["content"].startswith("default-src 'none'; img-src data:;")


def test_whatever_a_text_holds_it_stays_text(run):
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("prompts: null", "prompts: ['</code><script>alert(2)</script>']"))
    measured(run, [TEACHER, STUDENT | {"solver": "<b>bold"}], PROVENANCE | {"</dl>": "<i>"})
    made = page(run)
    assert len(made.all("script")) == 1 and not made.all("b") and not made.all("i")
    assert HOSTILE in made.text and "</code><script>alert(2)</script>" in made.text and "</dl>" in made.text
    assert all(found.get("alt", "") for found in made.all("img"))
    assert {found["alt"] for found in made.all("img")} >= {f"student, 2 steps: {HOSTILE}"}


def test_pictures_are_those_of_the_run_exactly(finished):
    run, made = finished
    (shown,) = made.all("img", alt="student at iteration 100: a red ring")
    with Image.open(io.BytesIO(base64.b64decode(shown["src"].partition(",")[2]))) as picture:
        kept = Image.open(run / "samples" / "pictures" / "000100" / "student-2steps" / "00001.png")
        assert picture.convert("RGB").tobytes() == kept.tobytes() and shown["class"] == "small"
    frames = [found for found in made.all("figure") if "frame" in found["class"].split()]
    assert ["hidden" in found for found in frames] == 2 * [True, True, False]  # without JavaScript the last is shown
    (slider,) = made.all("input")
    assert (slider["data-steps"], slider["max"]) == ("0 100 205", "2")


@pytest.mark.parametrize("other", [{"prompts": ["a red ring", "another"]}, {"seed": 1}])
def test_steps_at_which_other_prompts_or_other_noise_were_drawn_are_left_out_and_told(run, other):
    drawn(run / "samples" / "pictures" / "000100", {"student-2steps": 100}, **other)
    made = page(run)
    (slider,) = made.all("input")
    assert slider["data-steps"] == "0 205" and "are left out: those at 100." in made.text
    drawn(run / "samples" / "pictures" / "teacher", {"teacher-25steps": 0}, **other)
    assert not page(run).all("img", alt=f"teacher, 25 steps: {PROMPTS[1]}")


def test_advice_of_a_finished_run_works_on_a_finished_run(tmp_path):
    for k, (more, said) in enumerate(
        (([], ""), (["data.prompts=PROMPTS"], " --prompts FILE"), (["data.frames=5"], "stepdistill sample"))
    ):
        (tmp_path / "prompts.txt").write_text("a cat")
        run = bare(tmp_path / f"done{k}", *(one.replace("PROMPTS", str(tmp_path / "prompts.txt")) for one in more))
        log(run, 205)
        made = page(run).text
        assert "eval.every=100" not in made and f"stepdistill eval {run}" * (k < 2) + said in made
    log(run, 204)
    assert "eval.every=100" in page(run).text


def test_evaluated_pictures_come_before_samples(run):
    drawn(run / "eval" / "pictures", {"student-2steps": 7, "teacher-25steps": 8}, ["one", "two"])
    made = page(run)
    assert made.all("img", alt="teacher, 25 steps: two") and not made.all("img", alt=f"student, 2 steps: {PROMPTS[1]}")


def test_large_pictures_and_strips_of_videos_are_made_smaller(tmp_path):
    run = bare(tmp_path / "large")
    drawn(run / "eval" / "pictures", {"student-2steps": 1}, shape=(3 * 96, 640))
    (shown,) = page(run).all("img", alt=f"student, 2 steps: {PROMPTS[1]}")
    assert (shown["width"], shown["height"]) == ("512", "230") and "class" not in shown
    assert [file.suffix for file in (run / "eval" / "pictures" / "student-2steps").iterdir()] == [".webp"] * 2


def test_a_run_that_has_not_begun_says_what_makes_the_rest(tmp_path, capsys):
    run = bare(tmp_path / "new")
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    made = Page((run / "report.html").read_text())
    assert f"stepdistill eval {run}" in made.text and "eval.every=100" in made.text
    assert f"Trained 0 of 205 steps; this command goes on: stepdistill train {run / 'recipe.yaml'} --output {run}" in made.text
    assert "Use it" not in made.text and not made.all("svg") and not made.all("table")


def test_an_unfinished_run_and_one_that_kept_grids_alone(tmp_path):
    run = bare(tmp_path / "half")
    log(run, 1)
    with (run / "log.jsonl").open("a") as file:
        file.write('{"step": 2, "sec')  # a crash
    (run / "samples").mkdir()
    for step in (0, 1):
        Image.new("RGB", (64, 48 + step)).save(run / "samples" / f"{step:06d}.png")
    made = page(run)
    assert "Trained 1 of 205" in made.text and f"stepdistill export {run}" in made.text
    (grid,) = made.all("img")
    assert (grid["width"], grid["height"]) == ("64", "49") and len(made.all("svg")) == 3


def test_what_cannot_be_read_is_told(run):
    (run / "eval" / "tiny.json").write_text('{"rows": [')
    (run / "export" / "stepdistill.json").write_text("{}")
    (run / "samples" / "pictures" / "000205" / "student-2steps" / "00000.png").write_bytes(b"torn")
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("name: dmd2", "name: 'absent.package:Method'"))
    made = page(run)
    for part in (
        "tiny.json holds no figures that this version reads",
        "export the run again",
        "absent.package:Method",
        "no picture",
    ):
        assert part in made.text
    assert "The gradient's norm before it is clipped" in made.text  # what holds whatever the strategy


def test_where_the_time_went(run):
    assert "Where the time went" not in page(run).text
    spent = {"student": 120.0, "evaluation": 79.96, "data": 0.04}
    (run / "summary.json").write_text(json.dumps({"steps": 205, "starts": 1, "spent": spent}))
    text = "".join(page(run).text.split())
    assert "Wherethetimewentstudent2min,60.0%evaluation80s,40.0%" in text and "data0s" not in text


@pytest.fixture
def two(tmp_path):
    one, other = whole(tmp_path / "one"), bare(tmp_path / "other")
    measured(other, [TEACHER, STUDENT | {"fd": 9.5}])
    drawn(other / "eval" / "pictures", {"student-1steps": 5, "teacher-25steps": 6}, [PROMPTS[1], "another"])
    return one, other


def test_two_runs_beside_each_other(two):
    made = page(*two)
    assert (two[0].parent / "report.html").is_file()
    assert len(made.all("tr", **{"class": "student"})) == 2
    assert len(re.findall(r"teacher, 25 steps\s*guided 3, UniPC", made.text)) == 1  # what they share is told once
    assert {found["href"] for found in made.all("a")} >= {"#run-1", "#run-2", "#figures", "#pictures", "#top"}
    shown = [found["alt"] for found in made.all("img") if "iteration" not in found["alt"] and "teacher" not in found["alt"]]
    assert shown == ["one, 2 steps: a red ring", "other, 1 step: a red ring"]  # the prompt that both drew


def test_two_teachers_are_never_one(two):
    _, other = two
    assert "Every picture of a prompt starts from the same noise" not in page(*two).text  # the lists of prompts differ
    drawn(other / "eval" / "pictures", {"student-2steps": 0, "teacher-25steps": 1})
    made = page(*two)
    assert "Every picture of a prompt starts from the same noise" in made.text
    recipe = (other / "recipe.yaml").read_text()
    (other / "recipe.yaml").write_text(recipe.replace("source: stepdistill/tiny-sd\n", "source: stepdistill/tiny-sd3\n"))
    made = page(*two)
    for of in ("tiny-sd", "tiny-sd3"):
        assert made.all("img", alt=f"teacher, 25 steps of stepdistill/{of}: a red ring")
        assert f"guided 3, UniPC, stepdistill/{of}" in made.text and f"teacher of stepdistill/{of}, dashed" in made.text
    assert "start from different noise" in made.text


def test_runs_of_equal_name_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for home in "ab":
        (tmp_path / home).mkdir()
        bare(tmp_path / home / "same")
    assert main(["report", "a/same", "b/same"]) == 0
    assert "a/same" in Page((tmp_path / "report.html").read_text()).text  # where the command runs


def test_runs_that_do_not_compare_are_refused_by_field(two, capsys):
    measured(two[1], provenance={"compared": {"n": 9, "noise": "by index"}, "told": {"torch": "1"}})
    assert main(["report", *map(str, two)]) == 2
    said = capsys.readouterr().err
    assert "n is 8 and 9" in said and "noise" not in said and "torch" not in said and "Traceback" not in said
    assert not (two[0].parent / "report.html").exists()
    measured(two[1], provenance={"n": 8})
    assert "tiny.json holds no figures that this version reads; measure them again: stepdistill eval" in page(*two).text


def test_places_that_cannot_be(tmp_path):
    run = bare(tmp_path / "new")
    for folders, out, said in (
        ([tmp_path], None, "no run folder"),
        ([run, run], None, "given twice"),
        ([run], tmp_path / "absent" / "x.html", "is no folder; make it first"),
    ):
        with pytest.raises(UserError, match=said):
            write(folders, out)
    assert write([run], tmp_path) == tmp_path / "report.html"


def test_an_export_names_its_prompt_as_python(tmp_path):
    run = bare(tmp_path / "quoted")
    export(run / "export")
    text = page(run).text
    code = text[text.index("import stepdistill") : text.index("With stock diffusers")]
    compile(code.replace("Copy", ""), "shown", "exec")
    assert json.dumps(HOSTILE) in code


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (3725, "1 h 2 min")])
def test_durations_read(seconds, text):
    assert duration(seconds) == text
