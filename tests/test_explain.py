"""What `stepdistill explain` prints: every strategy says all there is to say, and names every number that it logs."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from worlds import VP, Gaussian, play

from stepdistill.batch import Batch, Draw
from stepdistill.explain import HEADINGS, explanation, laid_out, sections, table
from stepdistill.fields import fields_of
from stepdistill.recipe import shown
from stepdistill.strategies import STRATEGIES

EVERY = pytest.mark.parametrize("name", STRATEGIES)
MORE = {"dmd2": {"gan": 1.0}, "tscd": {"mix": (0.1,) * 4}}  # settings with which a strategy logs all that it can


def words(text: str) -> str:
    """On one line."""
    return " ".join(text.split())


@EVERY
@pytest.mark.parametrize("width", [80, 96])
def test_all_is_said_and_fits_the_terminal(name, width):
    kind = STRATEGIES[name]
    text = explanation(name, kind, width)
    assert text.startswith(f"{name}: ")
    assert re.search(r"\d{4}, arXiv:\d{4}\.\d{5}", text.splitlines()[1])
    for heading in ("What it does", *HEADINGS, "Roles", "Data", "Keys"):
        assert len(re.findall(rf"^{heading}", text, re.MULTILINE)) == 1, heading
    told = sections(inspect.getdoc(kind))
    assert list(told) == ["What it does", *HEADINGS]
    for paragraphs in told.values():
        assert all(words(paragraph) in words(text) for paragraph in paragraphs)
    for spec in fields_of(kind).values():
        assert spec.comment, f"{name}.{spec.name} has no comment"
        assert f"{spec.name} {shown(spec.default)} {spec.comment}" in words(text)
    assert max(map(len, text.splitlines())) <= width


@EVERY
def test_every_number_that_is_logged_is_spoken_of(name):
    one = STRATEGIES[name](**MORE.get(name, {}))
    roles = play(VP, "eps", Gaussian(0.0, 1.0), **{role: Gaussian(0.5, 1.0) for role in one.roles})
    one.setup(roles)
    torch.manual_seed(0)
    batch = Batch(torch.randn(4, 6), cond={}, null={}, x0=torch.randn(4, 6))
    logged = {f"{who}/{key}" for who, _, logs in one.losses(roles, batch, Draw(0, 0, range(4))) for key in logs}
    curves = sections(inspect.getdoc(type(one)))["Healthy curves"]
    assert logged
    assert logged <= set(re.findall(r"\w+/\w+", " ".join(curves)))


def test_paragraphs_belong_to_the_heading_above_them():
    doc = "It does.\n\nAnd more.\n\nObjective: to\nlearn.\n\n    x = 1\n\nWhen to choose it: x_t is no word. Objective: none."
    assert sections(doc) == {
        "What it does": ["It does.", "And more."],
        "Objective": ["To\nlearn.", "    x = 1"],
        "When to choose it": ["x_t is no word. Objective: none."],
    }


def test_text_is_wrapped_and_maths_is_not():
    assert laid_out("one two\nthree", 11) == "  one two\n  three"
    assert laid_out("- one two three\n- four", 11) == "  - one two\n    three\n  - four"
    assert laid_out("    y  =  1\n      + 2 + 3 + 4 + 5", 11) == "      y  =  1\n        + 2 + 3 + 4 + 5"


def test_columns_are_aligned_and_the_last_is_wrapped():
    rows = [("a", "[1, 2]", "one two"), ("bcd", "3", "four"), ("e", "5", "")]
    assert table(rows, 21).splitlines() == ["  a    [1, 2]  one", "               two", "  bcd  3       four", "  e    5"]
