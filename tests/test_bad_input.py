"""What users write into recipes by mistake or malice: each is one problem, told with key, value, rule and remedy."""

import dataclasses
import math
import os
import types
import typing

import pytest
from written import GOOD, only, problems, write

from stepdistill.errors import UserError
from stepdistill.fields import Place, fields_of
from stepdistill.recipe import MOST, RecipeError, load_recipe, read_recipe
from stepdistill.sections import SECTIONS
from stepdistill.strategies import STRATEGIES
from stepdistill.yaml_tree import DEPTH, NODES, SIZE, dumped, read_tree, shown

HUGE = 10**30
WRONG = {  # type: what is none of it, or none that any field takes
    int: ["zzz", 3.5, True, None, [1], {"a": 1}, math.nan, math.inf, HUGE, -HUGE, "0x1F", "1:30", "2001-99-99", "1e400", " "],
    float: ["zzz", True, None, [1.5], {"a": 1}, math.nan, -math.inf, 1e300, -1e300, HUGE, "1e400", "0x1p3", "", "nan", "inf"],
    bool: ["zzz", 1, 0.0, None, [True], {"a": True}, "true", "yes please", HUGE, -1, "", " ", "0", math.nan, "1"],
    str: [3, True, None, 0.5, {"a": 1}, "", " \n", "a\0b", "\ud800", "x" * 10_001, -1, math.nan, [["a"]], HUGE, False],
    Place: [
        3,
        True,
        None,
        {"a": 1},
        "",
        "a\nb",
        "\x1b[31mred",
        "\u202egnp",
        "x" * 300,
        "x/" * 3000,
        "\0",
        1.5,
        "\t",
        HUGE,
        "\x85",
    ],
    "word": ["zzz", 99, True, None, [1], {"a": 1}, math.nan, "", HUGE, "NO ", "x" * 9999, "\x1b[31m", -1, 0.5, ["no"]],
    "list": ["zzz", 3, True, None, {"a": 1}, [{"a": 1}], [[]], [None], math.nan, "[1, 2]", HUGE, "", [math.nan], [True], 0.5],
}
N = len(WRONG[int])


def wrong(kind, k):
    """The k-th value that is wrong for a type: for one of several types, what is wrong for all."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind in WRONG:
        return WRONG[kind][k]
    if origin is typing.Literal:
        return WRONG["word"][k]
    if origin in (tuple, list):
        return WRONG["list"][k]
    assert origin in (types.UnionType, typing.Union), kind
    others = [one for one in inner if one is not types.NoneType]
    value = wrong(others[0], k)
    if value is None or (isinstance(value, list) and len(others) > 1):
        return {"neither": k}
    return value


def outside(spec):
    """Numbers just outside of a field's range."""
    bounds = spec.range
    below = bounds.above if bounds.above is not None else bounds.low - (1 if isinstance(bounds.low, int) else 1e-9)
    beyond = bounds.below if bounds.below is not None else bounds.high + (1 if isinstance(bounds.high, int) else 1e-9)
    return below, beyond


def tree_of(root, strategy="lcm"):
    tree = read_tree(GOOD.format(root=root)).values
    tree["strategy"] = {"name": strategy}
    tree["train"]["steps"] = 10_000
    return tree


def told(tree, file):
    """The problems of a tree, by their keys in the order of lines; each of them one line that a terminal shows as it is."""
    text = dumped(tree)
    with pytest.raises(RecipeError) as caught:
        read_recipe(text, file)
    lines = caught.value.problems
    assert all(line.isprintable() and len(line) < 2100 for line in lines), lines
    assert all(line.startswith(f"{file}:") for line in lines), lines
    return [(line.split("  ", 1)[1].split(": ")[0], line) for line in lines]


PLACES = [(key, "lcm") for key in SECTIONS] + [("strategy", name) for name in STRATEGIES]


@pytest.mark.parametrize(("section", "strategy"), PLACES, ids=[" ".join(place) for place in PLACES])
def test_every_field_is_checked_by_itself(root, section, strategy):
    """All fields of a section are wrong at once, in one way after another: each is told once, with value, rule and remedy."""
    specs = fields_of(STRATEGIES[strategy] if section == "strategy" else SECTIONS[section])
    for k in range(N):
        tree = tree_of(root, strategy)
        given = {name: wrong(spec.type, k) for name, spec in specs.items()}
        tree[section] = given | ({"name": strategy} if section == "strategy" else {})
        found = told(tree, root / "x.yaml")
        assert [key for key, _ in found] == [f"{section}.{name}" for name in specs], found
        for (_, line), value in zip(found, given.values(), strict=True):
            short = shown(value)[:20]
            assert short in line or (isinstance(value, list) and shown(value[0])[:20] in line), (line, value)
            assert any(words in line for words in (" must ", "; ")), line


@pytest.mark.parametrize(("section", "strategy"), PLACES, ids=[" ".join(place) for place in PLACES])
def test_every_number_has_two_bounds_and_is_held_to_them(root, section, strategy):
    specs = fields_of(STRATEGIES[strategy] if section == "strategy" else SECTIONS[section])
    numbered = {name: spec for name, spec in specs.items() if {int, float} & set(leaves(spec.type))}
    assert all(spec.range for spec in numbered.values()), "a number without a range"
    for side in (0, 1):
        tree = tree_of(root, strategy)
        for name, spec in numbered.items():
            out = outside(spec)[side]
            listed = next((t for t in (spec.type, *typing.get_args(spec.type)) if typing.get_origin(t) is tuple), None)
            n = 1 if listed is None or typing.get_args(listed)[1] is Ellipsis else 2
            tree.setdefault(section, {})[name] = [out] * n if listed else out
        if numbered:
            found = told(tree, root / "x.yaml")
            assert {key for key, _ in found} == {f"{section}.{name}" for name in numbered}, found
            assert len(found) == len(numbered) and all("out of range; it must be" in line for _, line in found)


def leaves(kind):
    inner = typing.get_args(kind)
    return (
        [leaf for one in inner for leaf in leaves(one)] if inner and typing.get_origin(kind) is not typing.Literal else [kind]
    )


@pytest.mark.parametrize(("section", "strategy"), PLACES, ids=[" ".join(place) for place in PLACES])
def test_misspelt_missing_and_doubled_keys(root, section, strategy):
    specs = fields_of(STRATEGIES[strategy] if section == "strategy" else SECTIONS[section])
    for name, spec in specs.items():
        tree = tree_of(root, strategy)
        given = tree.setdefault(section, {})
        given.pop(name, None)
        if spec.default is dataclasses.MISSING:
            key, line = told(tree, root / "x.yaml")[0]
            assert (key, "is missing; add" in line) == (f"{section}.{name}", True)
        odd = f"{name[:-1]}{'z' if name[-1] != 'z' else 'y'}x"
        given[odd] = 1
        found = dict(told(tree, root / "x.yaml"))
        assert "unknown key; " in found[f"{section}.{odd}"]
        text = dumped(tree_of(root, strategy) | {section: {}})
        text = text.replace(f"{section}: {{}}\n", f"{section}:\n  {name}: 1\n  {name}: 2\n")
        with pytest.raises(RecipeError) as caught:
            read_recipe(text, root / "x.yaml")
        assert any(f"{section}.{name}: occurs twice, first in line " in line for line in caught.value.problems)


TEXTS = {  # what a file may hold: what is said, at which line (None: of the file)
    "bomb": ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "&a: anchors (&) and aliases (*) are not read; write", 1),
    "self": ("model: &m {source: *m}\n", "&m: anchors", 1),
    "alias": ("model: *m\n", "*m: anchors (&) and aliases (*) are not read", 1),
    "merge": ("a: 1\nmodel:\n  <<: *x\n", "*x: anchors", 3),
    "merged": ("model:\n  <<: {source: a}\n", "model.<<: unknown key", 2),
    "deep list": ("model: " + "[" * 5000, f"nested more than {DEPTH} deep", 1),
    "deep section": ("\n".join(" " * k + "a:" for k in range(500)), f"nested more than {DEPTH} deep", DEPTH + 1),
    "deep keys": ("? " * 5000, f"nested more than {DEPTH} deep", 1),
    "many": ("eval: {prompts: [" + "a," * NODES, f"more than {NODES:,} keys and values", 1),
    "long": ("#" * (SIZE + 1), f"more than {SIZE:,} bytes", None),
    "tab": ("model:\n\tsource: a\n", "indent with spaces", 2),
    "python": ("model: !!python/object/apply:os.system ['true']\n", "tags (!) are not read", 1),
    "set": ("model: !!set {a}\n", "tags (!) are not read", 1),
    "binary": ("model: !!binary aGk=\n", "tags (!) are not read", 1),
    "omap": ("model: !!omap [a: 1]\n", "tags (!) are not read", 1),
    "int": ("train: {steps: !!int '3'}\n", "tags (!) are not read", 1),
    "bare": ("train: {steps: ! '3'}\n", "tags (!) are not read", 1),
    "list as key": ("model:\n  [a, b]: 1\n", "a key must be a word", 2),
    "section as key": ("{a: 1}: 1\n", "a key must be a word", 1),
    "documents": ("model: {}\n---\nlora: {}\n", "a second document begins here", 2),
    "latin-1": ("# ok\n# caf\xe9\n".encode("latin-1"), "byte 0xe9 is no text in UTF-8", 2),
    "utf-16": (GOOD.encode("utf-16"), "is no text in UTF-8; save the file as UTF-8", 1),
    "utf-16 without mark": ("model: {}\n".encode("utf-16-le"), r"character '\x00' is not allowed", 1),
    "zero": (b"model:\n  source: a\0b\n", r"character '\x00' is not allowed", 2),
    "escape": (b"model: \x1b[31m\n", r"character '\x1b' is not allowed", 1),
    "half": ('name: "\\ud800"\n', r"name: ", 1),
    "no escape": ('name: "\\Uffffffff"\n', "this is not valid YAML", None),
    "version": ("%YAML 9.9\n---\nmodel: {}\n", "this is not valid YAML", 1),
    "long version": (f"%YAML 1.{'9' * 5000}\n---\nmodel: {{}}\n", "this is not valid YAML", None),
    "unclosed": ("model: {source: 'a\n", "this is not valid YAML", 2),
    "colon": ("model: a: b\n", "text with : or # needs quotes", 1),
    "number": ("3\n", "3 is no recipe; write sections", 1),
    "list": ("- model\n", "[model] is no recipe", 1),
    "word": ("model\n", "model is no recipe", 1),
    "null key": ("null: 1\n", "null: unknown key", 1),
    "number key": ("1: 1\n", "1: unknown key", 1),
    "empty key": ("train:\n  '': 1\n", "train.: unknown key", 2),
    "dotted key": (
        "train.steps: 3\n",
        "train.steps: unknown key; points are of the command line: in a file, write train: {st",
        1,
    ),
    "coloured key": ('"\\e[31m": 1\n', r"\x1b[31m: unknown key", 1),
}


@pytest.mark.parametrize("case", TEXTS)
def test_a_text_that_is_no_recipe(tmp_path, case):
    text, said, line = TEXTS[case]
    file = tmp_path / "x.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    found = problems(file)
    where = f"{file}:{line}  " if line else f"{file}  "
    assert any(said in problem and problem.startswith(where) for problem in found), found
    assert all(problem.isprintable() for problem in found)


def test_a_mark_at_the_beginning_is_no_letter(root):
    file = root / "my.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + GOOD.format(root=root).encode())
    assert load_recipe(file).lora.rank == 16
    file.write_bytes(GOOD.format(root=root).replace("\n", "\r\n").encode())
    assert load_recipe(file).lora.rank == 16


def test_plain_words_and_numbers_are_what_they_look_like(root):
    """No dates, no base 8, 16 or 60: what is not decimal is text."""
    recipe = load_recipe(write(root), ["model.revision=2024-01-01", "train.steps=010", "optim.clip=1_0.5", "lora.rank=1_6"])
    assert (recipe.model.revision, recipe.train.steps, recipe.optim.clip, recipe.lora.rank) == ("2024-01-01", 10, 10.5, 16)
    assert load_recipe(write(root), ["model.revision=0123456"]).model.revision == "0123456"
    assert load_recipe(write(root), ["model.revision='1234567'"]).model.revision == "1234567"
    assert "1234567 must be null or text; put it in quotes" in only(write(root), "model.revision=1234567")
    for text in ("0x1F", "0b11", "1:30", "2001-99-99", "1e400", "9" * 300, "9" * 9000, ".inf", "-.inf", ".nan", "1.5", "-1"):
        assert only(write(root), f"train.steps={text}").startswith("command line  train.steps: ")


def test_many_problems_are_told_in_part(root):
    text = GOOD + "".join(f"key{k}: 1\n" for k in range(3000))
    found = problems(write(root, text))
    assert len(found) == MOST + 1
    assert found[-1] == f"and {3000 - MOST:,} more; mend these first"


def test_what_is_no_file(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    names = ("pipe.yaml", "loop.yaml", "folder.yaml", "zero.yaml", "x" * 300, "x/" * 3000, "a\0b", "", ".", "/", "\ud800", "\n")
    for name in (*(tmp_path / name for name in names[:4]), *names[4:]):
        with pytest.raises(UserError, match="neither a file") as caught:
            load_recipe(name)
        assert len(str(caught.value)) < 3000
    (tmp_path / "empty.yaml").write_text("")
    assert sum("is missing" in text for text in problems(tmp_path / "empty.yaml")) == 4
    large = tmp_path / "large.yaml"
    with large.open("wb") as file:
        file.truncate(10**8)
    assert f"more than {SIZE:,} bytes" in only(large)
    monkeypatch.setattr("pathlib.Path.open", refuse)
    assert only(large) == f"{large}  cannot be read (Permission denied); give a file that you may read"


def refuse(*_args, **_kw):
    raise PermissionError(13, "Permission denied", "somewhere")


def test_overrides_of_every_kind(root):
    file = write(root)
    for override in (
        "=1",
        "a",
        ".=1",
        "..=",
        "=",
        "train.=1",
        "a." * 5000 + "b=1",
        "train.steps=&a 1",
        "train.steps=*a",
        "train.steps=!!python/name:os.system",
        "train.steps=" + "[" * 5000,
        "train.steps=a: b: c",
        "train.steps=\x1b[31m",
        "train.steps=\udcff",
        "\udcff=1",
        "train.steps=3\n---\n4",
        "train=[]",
        "model=",
        "=" * 5000,
        "name=\u202e",
        "trust_remote_code=1",
        "strategy.name=[lcm]",
        "strategy.name={lcm: 1}",
        "strategy.name=os:path",
        "strategy.name=3",
        "strategy=lcm",
        "name=3",
        "name=" + "x" * 101,
        "name=../up",
        "lora.targets=[a, a]",
        "eval.steps=[4, 4]",
        "eval.prompts=[a, ' ']",
        f"eval.prompts={['a'] * 501}",
    ):
        text = "\n".join(problems(file, override))
        assert text.isprintable() or "\n" in text
        assert all(line.startswith("command line  ") and line.isprintable() for line in text.split("\n")), text


def test_a_source_that_the_disk_does_not_show(root, monkeypatch):
    file = write(root)
    monkeypatch.setattr("stepdistill.sections.check_prompts", lambda *_: refuse() or iter(()))
    with pytest.raises(PermissionError):
        load_recipe(file)
    monkeypatch.setattr("stepdistill.sections.check_prompts", lambda *_: (refuse() for _ in "1"))
    assert "data.prompts: somewhere cannot be read (Permission denied); give what you may read" in only(file)
