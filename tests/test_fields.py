"""What a dataclass declares is what a user is told, and YAML's values become the declared types or are refused."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest

from stepdistill.fields import Place, Range, convert, described, fields_of, numbers, ranged


@dataclass
class Parent:
    kind: ClassVar[str] = "not a field"  # class variables are no keys
    first: int = ranged(low=1, high=9)  # how many, of the parent
    bare: bool = False


@dataclass
class Child(Parent):
    first: float = ranged(0.5, above=0, below=1)  # how much, of the child
    # told above
    # in two lines
    pair: tuple[float, float] = (1.0, 2.0)
    late: str = ranged(  # of a declaration in several lines
        "x"
    )


def test_fields_and_their_comments():
    fields = fields_of(Child)
    assert {name: field.comment for name, field in fields.items()} == {
        "first": "how much, of the child",
        "bare": "",
        "pair": "told above in two lines",
        "late": "of a declaration in several lines",
    }
    assert fields["first"].type is float
    assert str(fields["first"].range) == "above 0 and below 1"
    assert fields_of(Parent)["first"].comment == "how many, of the parent"
    with pytest.raises(TypeError, match="first"):
        Parent()  # ranged without a default is a required field


def test_range_ends():
    assert [x in Range(low=1, high=3) for x in (0.9, 1, 3, 3.1)] == [False, True, True, False]
    assert [x in Range(above=1, below=3) for x in (1, 1.1, 2.9, 3)] == [False, True, True, False]
    assert 10**30 in Range()


@pytest.mark.parametrize(
    ("value", "kind", "result"),
    [
        ("5e-5", float, 5e-5),
        (3, float, 3.0),
        ("1e3", int, 1000),
        (2**62 + 1, int, 2**62 + 1),
        (False, Literal["no", "bf16"], "no"),
        ([1, "2e0"], tuple[float, ...], (1.0, 2.0)),
        ([1, 2], list[int], [1, 2]),
        (None, float | None, None),
        ("1e-2", float | None, 0.01),
        ("1e-2", str | float, 0.01),
        (0.5, float | tuple[float, float], 0.5),
        ([1, 2], float | tuple[float, float], (1.0, 2.0)),
        ("a b", Place, "a b"),
    ],
)
def test_convert(value, kind, result):
    got = convert(value, kind)
    assert got == result
    assert type(got) is type(result)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (True, int),
        (True, float),
        (1.5, int),
        ("nan", float),
        (float("inf"), float),
        (10**400, float),
        (1, bool),
        ("true", bool),
        (3, str),
        (None, str),
        ("ab", tuple[str, ...]),
        ([1, 2, 3], tuple[float, float]),
        ("x", Literal["no", "bf16"]),
        (1, Literal["1"]),
        ([1, "x"], list[int]),
        ({"a": 1}, float | None),
    ],
)
def test_convert_refuses(value, kind):
    with pytest.raises(TypeError):
        convert(value, kind)


def test_described():
    assert described(float | None) == "null or a number"
    assert described(tuple[int, ...]) == "a list, each a whole number"
    assert described(tuple[float, float]) == "a list of 2, each a number"
    assert described(Literal["a", "b"]) == "one of a, b"
    assert described(bool) == "true or false"


def test_numbers():
    assert numbers([1, (2.5, "x"), True, None]) == [1, 2.5]
