"""Figures compare where all that decides them is equal, and nowhere else."""

import json

import pytest

from stepdistill.errors import UserError
from stepdistill.evaluate import results
from stepdistill.evaluate.measure import merged
from stepdistill.evaluate.presets import tiny_suite


def made(**changes):
    return {"compared": tiny_suite(65, captions=1).compared | changes, "told": {"torch": "1"}}


def test_equal_ones_compare_whatever_machine_they_are_of():
    results.compare(made(), made() | {"told": {"torch": "2", "machine": "other"}})
    assert results.differences(made(), json.loads(json.dumps(made()))) == []  # also after a file


def test_each_field_that_differs_is_named_with_both_values():
    judge = {"judge": made()["compared"]["features"]["judge"] | {"filter": "bicubic"}}
    other = made(n=2048, features=judge, extra="more")
    with pytest.raises(UserError) as told:
        results.compare(made(), other, ("runs/a", "runs/b"))
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
    assert field in made()["compared"]
    names = [name for name, *_ in results.differences(made(), made(**{field: "another"}))]
    assert names and {name.partition(".")[0] for name in names} == {field}


def test_files_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "eval/tiny.json"
    results.write(path, [{"who": "student", "fd": 1.5}], made())
    assert results.read(path) == {"format": 1, "rows": [{"who": "student", "fd": 1.5}], "provenance": made()}
    assert [file.name for file in path.parent.iterdir()] == ["tiny.json"]


@pytest.mark.parametrize("text", ["", "[]", '{"rows": []}', '{"format": 9, "rows": [], "provenance": {"compared": {}}}'])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=r"x.json holds no figures .* stepdistill eval"):
        results.read(tmp_path / "x.json")


def test_mappings_are_merged_within():
    assert merged({"a": {"x": 1}, "b": 1}, {"a": {"y": 2}, "c": 3}) == {"a": {"x": 1, "y": 2}, "b": 1, "c": 3}
