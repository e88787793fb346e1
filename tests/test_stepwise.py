"""Sampling by the trainer's own loop: what plain `sample` draws, the base model's steps, and the picture of all predictions."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from students import CASES, PROMPTS, student

from stepdistill import stepwise
from stepdistill.assemble import restore
from stepdistill.errors import UserError
from stepdistill.roles import Denoiser
from stepdistill.sampling import Inference, base_first
from stepdistill.serve import sample_run
from stepdistill.stepwise import Paths, Row, draw_rows, rows, sample_stepwise

PACKS = ("flux", "qwen")  # pipelines that draw noise in another form than their network reads


def pixels(file):
    return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(Image.open(file))])


def apart(a, b):
    """The largest difference of two files' pixels."""
    return int(np.abs(pixels(a).astype(int) - pixels(b)).max())


@pytest.fixture(scope="module")
def exported(exported_eps):
    """An export folder."""
    return exported_eps[1] / "export"


def test_without_base_steps_it_is_the_picture_of_sample(exported, tmp_path):
    plain = sample_run(exported, PROMPTS[0], 2, 3, tmp_path / "plain.png")
    ours = sample_stepwise(exported, PROMPTS[0], 2, 3, tmp_path / "ours.png")
    assert apart(plain, ours) <= 1
    assert apart(ours, sample_stepwise(exported, PROMPTS[0], 2, 4, tmp_path / "other.png")) > 10
    base, free = (sample_stepwise(exported, PROMPTS[0], 2, 3, tmp_path / f"{w}.png", 1, False, w) for w in (None, 1.0))
    assert apart(ours, base) > 10 and apart(ours, free) > 10 and apart(base, free) > 10


@pytest.mark.long
@pytest.mark.parametrize("case", [case for case in CASES if not any(word in case for word in PACKS)])
def test_that_is_so_of_every_kind_of_student(made, case, tmp_path):
    name = "x.png" if made[case][0].family.frames is None else "x.gif"
    (tmp_path / "a").mkdir()
    plain = sample_run(made[case][1], PROMPTS[0], None, 3, tmp_path / name)
    ours = sample_stepwise(made[case][1], PROMPTS[0], None, 3, tmp_path / "a" / name)
    assert apart(plain, ours) <= (1 if name == "x.png" else 30)  # a palette is chosen anew for each file


@pytest.fixture(scope="module")
def paths(exported_eps):
    return Paths(restore(exported_eps[1] / "export"), PROMPTS[0], 3)


def test_the_base_takes_the_first_steps_and_the_student_the_others(paths, monkeypatch):
    asked, call = [], Denoiser.__call__

    def spy(self, x_t, t, cond, told=None):
        asked.append(("student" if self.adapter else "base", len(x_t), round(t[0].item() * 999)))
        return call(self, x_t, t, cond, told)

    monkeypatch.setattr(Denoiser, "__call__", spy)
    how = paths.distillation.inference()
    made = paths.latents(base_first(how, 2, paths.scale(how)))
    assert asked == [("base", 2, 999), ("base", 2, 749), ("student", 1, 499), ("student", 1, 249)]
    assert len(made) == 4 and made[0].equal(paths.latents(base_first(how, 1, paths.scale(how)))[0])
    plain = paths.latents(how)
    assert not made[0].equal(plain[0])
    noise = torch.randn(1, *paths.family.shape, generator=torch.Generator().manual_seed(3))
    assert plain[0].equal(paths.roles.student(noise, torch.ones(1), paths.cond).x0)  # not where the next step begins


def test_the_scale_is_what_was_distilled(paths, tmp_path):
    how = paths.distillation.inference()
    assert paths.scale(how) == 11  # the middle of LCM's 6 to 16
    assert paths.scale(replace(how, guidance=3.0)) == 3  # what the student is told
    assert paths.scale(replace(how, guidance=3.0), 1.0) == 1
    distilled = Paths(student(tmp_path, "flux", "data.resolution=16", strategy="{name: dmd2, guidance: 1}"), PROMPTS[0], 0)
    assert distilled.scale(replace(how, guidance=3.0)) == distilled.scale(how, 1.0) == 1  # there is nothing to guide with
    with pytest.raises(UserError, match=r"--base-guidance 2\.5: this base model's guidance is distilled into it; leave it out"):
        distilled.scale(how, 2.5)
    assert len(distilled.latents(base_first(Inference(how.hops[:2], renoise=False), 1, 1.0))) == 2


def test_rows(paths):
    how = paths.distillation.inference(2)
    mixed = base_first(how, 1, 11.0)
    shown = rows(paths, how, mixed)
    assert [row.label.splitlines()[-2:] for row in shown] == [
        ["2 steps, guided 11", "3 evaluations"],
        ["2 steps", "2 evaluations"],
        ["2 steps, guided 11", "4 evaluations"],
        ["25 steps, guided 11", "50 evaluations"],
    ]
    captions = [[caption.replace("\n", ", ") for caption, _ in row.cells] for row in shown]
    assert captions[0] == ["step 1 of 2, base, timestep 999", "step 2 of 2 (final), student, timestep 499"]
    assert captions[1] == ["step 1 of 2, student, timestep 999", "step 2 of 2 (final), student, timestep 499"]
    assert captions[3] == ["step 12 of 25, base, timestep 559", "step 25 of 25 (final), base, timestep 39"]
    assert np.array_equal(shown[0].cells[0][1], shown[2].cells[0][1])  # the base's first step is the same
    assert not np.array_equal(shown[0].cells[1][1], shown[1].cells[1][1])
    assert rows(paths, how, how)[0].label.startswith("student\n")


def test_cells_hold_their_pictures():
    """Enlarged by a whole factor below SMALL; each row at its height, each column at its place."""
    rng = np.random.default_rng(0)
    shown = [Row(f"row {r}", [(f"{r} {k}", rng.integers(0, 256, (48, 64, 3), np.uint8)) for k in range(3)]) for r in range(2)]
    sheet = np.asarray(draw_rows("a title that is so long that it takes more than one line of the sheet " * 3, shown))
    for row in shown:
        for _, picture in row.cells:
            big = picture.repeat(3, 0).repeat(3, 1)
            places = np.argwhere((sheet == big[0, 0]).all(-1))
            assert any(np.array_equal(sheet[y : y + 144, x : x + 192], big) for y, x in places)
    large = np.zeros((600, 800, 3), np.uint8)
    assert draw_rows("x", [Row("", [("", large)])]).width == draw_rows("x", [Row("", [("", large[:256, :256])])]).width


def test_the_sheet_of_a_run(exported_eps, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stepwise, "BASE_STEPS", 4)
    folder = exported_eps[1] / "export"
    out = sample_stepwise(folder, "A star!", 2, 1, first=1, show=True)
    assert str(out) == "a-star_2steps_seed1_base1_shown.png" and Image.open(out).format == "PNG"
    assert str(sample_stepwise(folder, "A star!", 1, 1)) == "a-star_1steps_seed1.png"


@pytest.mark.long
def test_videos(made, tmp_path):
    """A sheet shows three frames of each; base-first sampling gives an animation."""
    out = made["dmd2-wan-renoising"][1]
    sheet = Image.open(sample_stepwise(out, PROMPTS[0], None, 1, tmp_path / "x.png", first=1, show=True))
    assert sheet.height > 3 * 3 * 192
    assert Image.open(sample_stepwise(out, PROMPTS[0], None, 1, tmp_path / "x.gif", first=1)).n_frames == 5


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"prompt": "  "}, "--prompt is empty"),
        ({"seed": 2**64}, "64-bit"),
        ({"out": "x.gif"}, "must end in .png"),
        ({"first": 2}, r"--base-first-steps 2 of 2 steps leave none to the student; give at most 1"),
        ({"first": 1, "steps": 1}, r"--base-first-steps 1 of 1 step leaves none to the student; sample in more: --steps 2"),
    ],
)
def test_what_cannot_be(exported, change, told, tmp_path):
    asked = {"prompt": "a star", "steps": 2, "out": "x.png"} | change
    with pytest.raises(UserError, match=told):
        sample_stepwise(exported, **asked | {"out": tmp_path / asked["out"]})
    assert not list(tmp_path.iterdir())


def test_a_student_of_one_step(tmp_path):
    made = student(tmp_path, strategy="{name: vsd}")
    with pytest.raises(UserError, match="leave it out: this student takes no more steps"):
        stepwise.check_first(made, 1, 1)
    stepwise.check_first(made, 1, 0)
