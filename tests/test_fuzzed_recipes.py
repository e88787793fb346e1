"""Recipes broken at random: each is read and survives a round trip, or every problem with it is told, and nothing else."""

from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from stepdistill.errors import printable
from stepdistill.listing import shipped
from stepdistill.recipe import RecipeError, dump_recipe, read_recipe
from stepdistill.yaml_tree import dumped, read_tree

FILE = Path("mutated.yaml")
SHIPPED = [file.read_bytes() for file in shipped().values()]
KEYS = sorted({keys[-1] for text in SHIPPED for keys in read_tree(text).lines})
TOKENS = [
    b"&a ",
    b"*a",
    b"<<: *a",
    b"!!python/name:os ",
    b"!!set ",
    b"\t",
    b"- ",
    b"? ",
    b": ",
    b"{",
    b"[",
    b"'",
    b'"',
    b"|\n",
    b">",
]
TOKENS += [
    b"\0",
    b"\xff",
    b"\xfe\xff",
    b"\xef\xbb\xbf",
    b"\r",
    b"\x85",
    b"#",
    b"---\n",
    b"...\n",
    b"%YAML 1.1\n",
    b"\\x1b",
    b"~",
    b"1:30",
]
TOKENS += [
    b".nan",
    b"1e400",
    b"0x1F",
    b"010",
    b"9" * 400,
    b"2001-99-99",
    b"null",
    b"yes",
    b"\xed\xa0\x80",
    "\U0001f600".encode(),
]


def fuzz(n):
    """So many examples, always the same."""
    return settings(max_examples=n, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@st.composite
def texts(draw):
    """A shipped recipe with some lines or bytes removed, doubled, exchanged or written over."""
    text = draw(st.sampled_from(SHIPPED))
    for _ in range(draw(st.integers(1, 3))):
        lines = text.splitlines(keepends=True) or [b"\n"]
        i, j = (draw(st.integers(0, len(lines) - 1)) for _ in range(2))
        match draw(st.integers(0, 6)):
            case 0:
                del lines[i]
            case 1:
                lines.insert(j, lines[i])
            case 2:
                lines[i], lines[j] = lines[j], lines[i]
            case 3:
                name, _, _ = lines[i].partition(b":")
                lines[i] = name + b": " + draw(st.sampled_from(TOKENS) | st.binary(max_size=8)) + b"\n"
            case 4:
                _, _, value = lines[i].partition(b":")
                lines[i] = b"  " * draw(st.integers(0, 2)) + draw(st.sampled_from(KEYS)).encode() + b":" + value
            case _:
                at = draw(st.integers(0, len(lines[i])))
                lines[i] = lines[i][:at] + draw(st.sampled_from(TOKENS)) + lines[i][at + draw(st.integers(0, 3)) :]
        text = b"".join(lines)
    return text


NUMBERS = st.integers(-(10**20), 10**20) | st.integers(-2, 9) | st.floats() | st.floats(0, 1)
SCALARS = (
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8) | st.sampled_from(["/", ".", "~", "a/b", "stepdistill/tiny"])
)
VALUES = st.recursive(
    SCALARS, lambda some: st.lists(some, max_size=4) | st.dictionaries(st.sampled_from(KEYS), some, max_size=3)
)


@st.composite
def trees(draw):
    """A shipped recipe with some keys given any value, moved to other sections, or removed."""
    tree = read_tree(draw(st.sampled_from(SHIPPED))).values
    for _ in range(draw(st.integers(1, 4))):
        section = draw(st.sampled_from(sorted(tree)))
        home = tree[section] if isinstance(tree[section], dict) and tree[section] else tree
        key = draw(st.sampled_from(sorted(home)))
        match draw(st.integers(0, 3)):
            case 0 if len(tree) > 1 or home is not tree:
                del home[key]
            case 1:
                tree[draw(st.sampled_from(KEYS))] = home[key]
            case 2:
                home[draw(st.sampled_from(KEYS))] = draw(VALUES)
            case _:
                home[key] = draw(VALUES)
    return dumped(tree)


OVERRIDES = st.lists(
    st.builds(
        "{}{}{}".format,
        st.sampled_from(
            ["train.steps", "lora", "lora.rank", "eval.prompts", "name", "model.source", "strategy.name", "a.b", ""]
        ),
        st.sampled_from(["=", "=", "=", "", ".x=", "=="]),
        st.text(max_size=6) | st.sampled_from([token.decode("utf-8", "surrogateescape") for token in TOKENS]),
    ),
    max_size=3,
)


def read_or_told(text, overrides=()):
    """Whether a text is a recipe; it survives a round trip then, otherwise every problem is one plain line with its place."""
    try:
        recipe = read_recipe(text, FILE, overrides, there=False)
    except RecipeError as error:
        for line in error.problems:
            assert line.startswith((f"{FILE}:", f"{FILE}  ", "command line  ", "and ")), line
            assert printable(line) == line and "\n" not in line, line
        return False
    assert read_recipe(dump_recipe(recipe), FILE, there=False) == recipe
    return True


@fuzz(250)
@given(texts())
def test_mutated_texts(text):
    read_or_told(text)


@fuzz(200)
@given(trees())
def test_mutated_values(text):
    read_or_told(text)


@fuzz(150)
@given(st.sampled_from(SHIPPED), OVERRIDES)
def test_mutated_overrides(text, overrides):
    read_or_told(text, overrides)


@pytest.mark.long
@fuzz(2500)
@given(texts())
def test_many_mutated_texts(text):
    read_or_told(text)


@pytest.mark.long
@fuzz(2000)
@given(trees())
def test_many_mutated_values(text):
    read_or_told(text)


@pytest.mark.long
@fuzz(1500)
@given(st.sampled_from(SHIPPED), OVERRIDES)
def test_many_mutated_overrides(text, overrides):
    read_or_told(text, overrides)


@pytest.mark.long
@fuzz(2500)
@given(st.binary(max_size=60) | st.lists(st.sampled_from([*TOKENS, b"a", b"\n", b" ", b"  "]), max_size=20).map(b"".join))
def test_any_bytes(text):
    assert not read_or_told(text)


def test_mutations_reach_both_ends():
    """Enough of the mutated recipes are still recipes, and enough are none."""
    seen = []

    @fuzz(60)
    @given(texts() | trees())
    def look(text):
        seen.append(read_or_told(text))

    look()
    assert 0.05 < sum(seen) / len(seen) < 0.95
