"""Prompts of every kind of source, and of the grammar."""

import re
import sys

import pytest

from stepdistill.data.grammar import FILE, WORDS, read_grammar
from stepdistill.data.prompts import read_prompts
from stepdistill.data.tables import opened
from stepdistill.errors import UserError
from stepdistill.tiny.world import Scene

FILES = {
    "some.txt": "one\n\n  two  \nthree, or more\n",
    "some.jsonl": '{"prompt": "one"}\n\n{"caption": "two", "width": 3}\n{"text": " "}\n{"text": "three, or more"}\n',
    "some.csv": 'id,caption\n1,one\n2,two\n3,\n4,"three, or more"\n',
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_prompts_of_a_file_without_blank_ones(tmp_path, name, start):
    (tmp_path / name).write_text(start + FILES[name], encoding="utf-8")
    assert read_prompts(str(tmp_path / name)) == ["one", "two", "three, or more"]
    assert read_prompts(str(tmp_path / name), 2) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (
            "a.jsonl",
            '{"prompt": "one"}\n{"prompt": "tw',
            "a.jsonl:2 is not a JSON object with a text under prompt, caption or text",
        ),
        ("a.jsonl", '{"prompt": 1}', "a.jsonl:1 is not"),
        ("a.jsonl", "[]", "a.jsonl:1 is not"),
        ("a.csv", "words\none\n", "a.csv:2 is not a row with a text under"),
        ("a.csv", "prompt\n\n", "holds no prompt"),
        ("a.txt", "\n", "holds no prompt"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_its_line(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=re.escape(said)):
        read_prompts(str(tmp_path / name))


def test_what_is_not_text_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match=r"a\.txt:1 is not text in UTF-8"):
        read_prompts(str(tmp_path / "a.txt"))


def test_prompts_of_a_parquet_file(pyarrow, monkeypatch):
    pyarrow({"id": [1, 2, 3], "text": ["one", None, "three"]})
    assert read_prompts("some.parquet") == ["one", "three"]
    pyarrow({"words": ["one"]})
    with pytest.raises(UserError, match=r"cannot be read as Parquet \(no column prompt, caption or text, only words\)"):
        read_prompts("some.parquet")
    opened.cache_clear()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"^Parquet and Arrow .* not installed: pip install 'stepdistill\[data\]'"):
        read_prompts("some.parquet")


def test_prompts_of_the_embedded_world_are_ones_its_teachers_saw():
    told = [Scene.parse(prompt) for prompt in read_prompts("stepdistill/tiny", 200)]
    assert len(told) == 200 and not any(scene.held_out for scene in told)


def test_the_grammar_has_thousands_of_prompts_all_different_always_the_same():
    prompts = read_prompts("stepdistill/prompts")
    assert len(prompts) == len(set(prompts)) == 2048
    assert read_prompts("stepdistill/prompts", 3000)[:2048] == prompts and read_prompts("stepdistill/prompts", 5) == prompts[:5]
    lengths = [len(prompt.split()) for prompt in prompts]
    assert min(lengths) >= 3 and max(lengths) <= 40 and max(lengths) > 30
    words = {word for prompt in prompts for word in re.findall(r"\w+", prompt)}
    assert len(words) > 1000  # varied


def test_its_sentences_have_their_articles_and_no_gap():
    for prompt in read_prompts("stepdistill/prompts", 3000):
        assert prompt == " ".join(prompt.split()) and not re.search(r"[{}\[\]]|,,| ,", prompt), prompt
        assert not re.search(r"\ba (?!uni|uk|one )[aeiou]|\ban (?![aeiou])|\ban (uni|uk)", prompt, re.IGNORECASE), prompt


def test_every_rule_of_the_grammar_is_used_and_there():
    rules = read_grammar(FILE.read_text(encoding="utf-8"))
    named = {name for options in rules.values() for option in options for name in re.findall(r"\{([^}]+)\}", option)}
    assert named | {"prompt"} == set(rules)
    assert all(len(set(options)) > 1 for options in rules.values())
    assert 3 in WORDS and 40 in WORDS
