"""What a run keeps of its samples beside the grids."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from students import PROMPTS, student

from stepdistill.evaluate.grid import KEPT, Samples, keep_pictures
from stepdistill.report.pictures import read_film
from stepdistill.show import Line


def test_single_pictures_are_kept_as_they_were_drawn(tmp_path):
    made = student(tmp_path, "eps", "eval.steps=[2]", f"eval.prompts={PROMPTS}")
    samples = Samples(made, tmp_path / "samples", Line(io.StringIO()))
    for step in (0, 3):
        samples(step)
    film = read_film(tmp_path / "samples" / "pictures")
    assert list(film.frames) == [0, 3] and film.gallery.prompts == PROMPTS
    assert {strip.title for strip in film.gallery.strips} == {"teacher, 25 steps", "teacher, 2 steps", "student, 2 steps"}
    assert film.frames[3].seed == film.teacher.seed == made.recipe.eval.seed and film.left_out == []
    kept = [np.asarray(Image.open(file)) for file in film.teacher.find("teacher", 2).files]
    assert (np.array(kept) == samples.teacher[2]).all() and len(kept) == len(PROMPTS)


@pytest.mark.parametrize(("shape", "name", "size"), [((128, 128), "png", (128, 128)), ((1024, 2048), "webp", (KEPT, 256))])
def test_large_ones_are_kept_smaller(tmp_path, shape, name, size):
    keep_pictures(tmp_path / "row", np.zeros((1, *shape, 3), np.uint8))
    assert Image.open(tmp_path / "row" / f"00000.{name}").size == size
