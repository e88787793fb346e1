"""Figures compare where all that decides them is equal, and nowhere else."""

import json

import pytest

from stepdistill.errors import UserError
from stepdistill.evaluate import provenance
from stepdistill.evaluate.measure import merged
from stepdistill.evaluate.presets import tiny_suite


def made(**changes):
    return {"compared": tiny_suite(65, captions=1).compared | changes, "told": {"torch": "1"}}


def test_equal_ones_compare_whatever_machine_they_are_of():
    provenance.compare(made(), made() | {"told": {"torch": "2", "machine": "other"}})
    assert provenance.differences(made(), json.loads(json.dumps(made()))) == []  # also after a file


def test_each_field_that_differs_is_named_with_both_values():
    judge = {"judge": made()["compared"]["features"]["judge"] | {"filter": "bicubic"}}
    other = made(n=2048, features=judge, extra="more")
    with pytest.raises(UserError) as told:
        provenance.compare(made(), other, ("runs/a", "runs/b"))
    for part in (
        "runs/a and runs/b",
        "n is 65 and 2048",
        "features.judge.filter is none and bicubic",
        "extra is None and more",
    ):
        assert part in str(told.value)
    assert "reference" not in str(told.value)


@pytest.mark.parametrize("field", ["preset", "prompts", "n", "groups", "size", "measured", "noise", "features"])
def test_every_field_decides(field):
    assert [name for name, *_ in provenance.differences(made(), made(**{field: "another"}))] != []


def test_files_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "eval/tiny.json"
    provenance.write(path, [{"who": "student", "fd": 1.5}], made())
    assert provenance.read(path) == {"format": 1, "rows": [{"who": "student", "fd": 1.5}], "provenance": made()}
    assert [file.name for file in path.parent.iterdir()] == ["tiny.json"]


@pytest.mark.parametrize("text", ["", "[]", '{"rows": []}', '{"format": 9, "rows": [], "provenance": {"compared": {}}}'])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=r"x.json holds no figures .* stepdistill eval"):
        provenance.read(tmp_path / "x.json")


def test_mappings_are_merged_within():
    assert merged({"a": {"x": 1}, "b": 1}, {"a": {"y": 2}, "c": 3}) == {"a": {"x": 1, "y": 2}, "b": 1, "c": 3}
