"""Files of prompts and captions with anything in them: prompts come out, or the line that is wrong is named."""

import json

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from stepdistill.data.picture import Picture, Skipped
from stepdistill.data.pictures import read_pictures
from stepdistill.data.prompts import read_prompts
from stepdistill.errors import UserError

ROWS = {
    "p.txt": ["a cat", "a dog", "a red circle"],
    "p.jsonl": ['{"prompt": "a cat"}', '{"caption": "a \\u00e9"}', '{"text": "x", "n": 1}'],
    "p.csv": ["n,prompt", '1,"a cat, and more"', "2,a dog"],
    "metadata.jsonl": ['{"file_name": "a.png", "text": "a cat"}', '{"file_name": "b.png", "caption": "a dog"}'],
}
PIECES = [
    b"\xff",
    b"\xc3",
    b"\0",
    b"\x1b[31m",
    b'"',
    b"'",
    b",",
    b"\r",
    b"\n",
    b"\xe2\x80\xa8",
    b"{",
    b"}",
    b"[" * 100_000,
    b"null",
    b"1e999",
]
PIECES += [
    b'"\\ud800"',
    b'"\\u0000"',
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"9" * 5000,
    b"x" * 20_000,
    b"NaN",
    b"\xed\xa0\x80",
    b"\\",
    b"../",
]


def fuzz(n):
    return settings(max_examples=n, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@st.composite
def damaged(draw):
    """A file's name, and its text with some bytes put in or taken out."""
    name = draw(st.sampled_from(sorted(ROWS)))
    text = "\n".join(ROWS[name]).encode()
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.sampled_from(PIECES) | st.binary(max_size=3)) + text[at + draw(st.integers(0, 4)) :]
    return name, text


def look(folder, name, text):
    (folder / name).write_bytes(text)
    if name == "metadata.jsonl":
        for one in read_pictures(str(folder)):
            assert isinstance(one, Skipped) or is_text(one.caption)
            assert isinstance(one, Picture) or one.reason
        return
    try:
        prompts = read_prompts(str(folder / name))
    except UserError as error:
        assert str(error).startswith(f"{folder / name}")
        assert all(letter.isprintable() for letter in str(error))
    else:
        assert prompts and all(map(is_text, prompts))


def is_text(prompt):
    return prompt.encode() and prompt == prompt.strip() and len(prompt) <= 10_000 and "\0" not in prompt


@fuzz(100)
@given(damaged())
def test_damaged_files(tmp_path_factory, case):
    look(pictures(tmp_path_factory), *case)


@pytest.mark.long
@fuzz(3000)
@given(damaged())
def test_many_damaged_files(tmp_path_factory, case):
    look(pictures(tmp_path_factory), *case)


def pictures(factory):
    """A folder with two pictures, as far as listing them looks."""
    folder = factory.getbasetemp() / "damaged"
    if not folder.is_dir():
        folder.mkdir()
        for name in "ab":
            (folder / f"{name}.png").write_bytes(b"picture")
    return folder


WRONG = [  # name, text, line, what is said
    ("p.txt", b"a cat\ncaf\xe9\n", 2, "is not text in UTF-8"),
    ("p.csv", b"prompt\na cat\ncaf\xe9\n", 3, "is not text in UTF-8"),
    ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "\xff"}\n', 2, "is not text in UTF-8"),
    ("p.txt", b"a cat\n" + b"x" * 10_001, 2, "must have at most 10,000 characters; shorten it"),
    ("p.txt", b"a\0b\n", 1, "cannot be printed; remove them"),
    ("p.jsonl", b'{"prompt": "a"}\n\n{"prompt": "\\ud800"}\n', 3, "half a character"),
    ("p.jsonl", b'{"prompt": ' + b"[" * 100_000, 1, "is not a JSON object with a text under"),
    ("p.jsonl", b'{"prompt": 3}', 1, "is not a JSON object with a text under"),
    ("p.jsonl", b'[{"prompt": "a"}]', 1, "is not a JSON object with a text under"),
    ("p.csv", b"n,prompt\n1,a\n2\n", 3, "is not a row with a text under"),
]


@pytest.mark.parametrize(("name", "text", "line", "said"), WRONG)
def test_the_line_is_named(tmp_path, name, text, line, said):
    (tmp_path / name).write_bytes(text)
    with pytest.raises(UserError, match=f"{name}:{line} ") as caught:
        read_prompts(str(tmp_path / name))
    assert said in str(caught.value) and len(str(caught.value)) < 500


def test_csv_keeps_its_own_ends_of_lines(tmp_path):
    (tmp_path / "p.csv").write_bytes(b'\xef\xbb\xbfprompt\r\n"a\r\nb"\r\nc\r\n')
    assert read_prompts(str(tmp_path / "p.csv")) == ["a\r\nb", "c"]


def test_captions_that_are_none(tmp_path):
    folder = tmp_path
    for name, caption in {"a": "x" * 10_001, "b": "a cat", "c": "\ud800"}.items():
        (folder / f"{name}.png").write_bytes(b"picture")
        with (folder / "metadata.jsonl").open("a") as file:
            file.write(json.dumps({"file_name": f"{name}.png", "text": caption}) + "\n")
    first, second, third = read_pictures(str(folder))
    assert second.caption == "a cat"
    assert "has a caption that must have at most 10,000" in first.reason
    assert "has half a character" in third.reason
