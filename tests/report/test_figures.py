"""The table of figures: nothing that was not measured, and the right one marked."""

from __future__ import annotations

import pytest
from runs_on_disk import STUDENT, TEACHER

from stepdistill.report.figures import QUALITY, apart, columns, quality, table, tiles
from stepdistill.report.page import series

ROWS = [STUDENT | {"run": "a"}, TEACHER | {"run": "a"}, STUDENT | {"run": "a", "steps": 1, "nfe": 1, "fd": 16.0, "ms": None}]


def heads(rows):
    return [column.key for column in columns(rows)]


def test_columns_that_nobody_filled_are_left_out():
    assert heads(ROWS) == ["nfe", "fd", "ms"]
    assert heads([STUDENT | {"ms": None, "clip": 0.0}]) == ["nfe", "fd", "clip"]
    colour = {"saturation": 0.5, "saturation_relative": 1.25, "contrast": 0.5}
    assert heads([STUDENT | colour]) == ["nfe", "fd", "saturation_relative", "ms", "contrast"]


def test_the_teacher_comes_first_then_students_by_steps():
    lines = table(ROWS)
    assert [line.who + line.steps for line in lines] == ["teacher, 25 steps", "student, 2 steps", "student, 1 step"]
    assert [line.how for line in lines] == ["guided 3, UniPC", "", ""]
    assert [line.cells[2].value for line in lines] == ["", "7.0", ""]


def test_intervals_are_shown_where_both_ends_are_known():
    one, other = (table([STUDENT | {"run": "a", "fd_low": 2.0, **more}])[0] for more in ({"fd_high": 3.0}, {}))
    assert one.cells[1].span == "2.00 \N{EN DASH} 3.00" and other.cells[1].span == ""


def test_of_several_runs_the_better_student_is_marked():
    rows = [*ROWS, STUDENT | {"run": "b", "fd": 2.0, "alignment": 0.5}, STUDENT | {"run": "b", "steps": 4, "alignment": 0.75}]
    best = [(line.run, line.steps, cell.value) for line in table(rows) for cell in line.cells if cell.best]
    assert best == [("b", ", 4 steps", "75.0"), ("b", ", 2 steps", "2.00")]
    assert not any(cell.best for line in table(ROWS) for cell in line.cells)  # of one run there is nothing to choose


def test_tiles_show_the_student_that_was_made_beside_the_teacher_at_its_best():
    weak = TEACHER | {"run": "a", "steps": 4, "fd": 30.0}
    assert [(tile.head, tile.value, tile.teacher) for tile in tiles([*ROWS, weak], 1)] == [
        ("evaluations", "1", "50"),
        ("FD", "16.00", "1.50"),
    ]
    assert tiles(ROWS, None)[0].value == "2" and tiles([TEACHER], 2) == []


@pytest.mark.parametrize("key", QUALITY)
def test_quality_is_the_first_figure_that_there_is(key):
    left = {name: 1.0 for name in QUALITY[QUALITY.index(key) :]}
    assert quality([{"who": "student", "nfe": 2, **left}]).key == key
    assert quality([{"who": "student", "nfe": 2}]) is None


def test_lines_of_a_plot_are_students_and_kinds_of_teacher():
    rows = [*ROWS, TEACHER | {"run": "a", "nfe": 25, "guidance": 1.0}, TEACHER | {"run": "b"}, STUDENT | {"run": "b"}]
    made = series(rows, quality(rows), {"a": "run1", "b": "run2"})
    assert [(one.name, one.colour, len(one.points)) for one in made] == [
        ("a", "run1", 2),
        ("b", "run2", 1),
        ("teacher", "teacher", 1),  # both runs have the same
        ("teacher, unguided", "unguided", 1),
    ]
    assert series(ROWS, quality(ROWS), {"a": "student"})[0].name == "student"


def test_other_teachers_are_other_lines():
    rows = [row | {"run": run, "of": of} for run, of in (("a", "one"), ("b", "other")) for row in (TEACHER, STUDENT)]
    made = series(rows, quality(rows), {"a": "run1", "b": "run2"})
    assert [(line.name, line.colour, line.who) for line in made] == [
        ("a", "run1", "student"),
        ("b", "run2", "student"),
        ("teacher of one, dashed", "run1", "teacher"),
        ("teacher of other, dashed", "run2", "teacher"),
    ]
    assert [line.how for line in table(rows)[:2]] == ["guided 3, UniPC, one", "guided 3, UniPC, other"]


def test_distances_to_different_teachers_are_not_ranked():
    near, far = ({"run": run, "of": "one", "fd": fd, "fidelity": fd} for run, fd in (("a", 1.0), ("b", 2.0)))
    for others, ranked in (("guided 3", 2), ("guided 4", 1)):
        rows = [STUDENT | near | {"apart_from": "guided 3"}, STUDENT | far | {"apart_from": others}]
        assert sum(cell.best for cell in table(rows)[0].cells) == ranked
        assert len(apart(rows)) == 3 - ranked
