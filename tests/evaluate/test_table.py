"""The table as text: its columns, its notes, and what it warns of."""

from stepdistill.evaluate.table import render

TEACHER = {"who": "teacher", "steps": 4, "nfe": 8, "guidance": 3.0, "solver": "UniPC", "n": 2048}
TINY = {"compared": {"preset": "tiny"}, "told": {"floor": 0.1}}
OWN = {"compared": {"preset": "coco30k-sd15"}, "told": {}}


def test_a_row_of_the_embedded_world():
    row = TEACHER | {"fd": 1.234, "fd_low": 1.0, "fd_high": 1.5, "alignment": 0.5, "diversity": None, "ms": 2.0}
    text = render([row], TINY)
    for part in ("teacher, 4 steps, guided 3", " 8 ", "1.23", "1.00 .. 1.50", "50.0%", "UniPC", "other drawings have 0.10"):
        assert part in text
    assert "diverse" not in text and "recall" not in text  # no row has such a figure
    lines = render([row, row | {"who": "student", "diversity": 0.9}], TINY).splitlines()
    assert [line.split(",")[0] for line in lines[3:5]] == ["teacher", "student"] and " - " in lines[3]


def test_lines_fit():
    figures = dict.fromkeys(("recall", "alignment", "diversity", "saturation_relative", "fidelity"), 0.987654)
    row = TEACHER | figures | {"steps": 25, "nfe": 50, "fd": 111.111, "fd_low": 100.01, "fd_high": 122.2, "ms": 12345.6}
    row["apart_from"] = "teacher, 25 steps, guided 7.5, DPM-Solver++"
    assert "pictures of the same noise by the teacher, 25 steps, guided 7.5, DPM-Solver++." in render([row], TINY)
    assert max(map(len, render([row], TINY).splitlines())) <= 120


def test_few_pictures_are_warned_of_where_it_matters():
    row = TEACHER | {"fd": 30.0, "fd_low": 29.0, "fd_high": 31.0, "kid": 0.0123, "clip": 0.31}
    assert "2048 pictures are few" in render([row], OWN) and "12.30" in render([row], OWN)
    assert "are few" not in render([row | {"n": 30_000}], OWN)
    assert "are few" not in render([row], TINY)
    assert "are few" not in render([TEACHER | {"clip": 0.31}], OWN)  # no FID, no warning
