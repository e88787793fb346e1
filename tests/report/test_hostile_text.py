"""Text of others stays text: in the report, in cards, and on a terminal (docs/security.md)."""

import io
import re

import pytest
import yaml
from hostile import serving
from PIL import Image
from runs_on_disk import PROVENANCE, STUDENT, TEACHER, drawn, log, measured, whole
from test_page import Page

from stepdistill.card import card, snippet
from stepdistill.card_notes import literal, plain, quoted
from stepdistill.cli import main
from stepdistill.report.page import write
from stepdistill.show import Line, printable, tell

EVIL = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>{{7*7}}{% raw %}</style>"
TERMINAL = "\x1b[2J\x1b]0;owned\x07\r\x9b31m\x00\u202eexe.gnp\u2066\ud800"
WORDS = [
    *["a cat", 'say "cat"', "a\\b", "# d | `e` ---\n---\n```", "eol\r\u2028\u0085", TERMINAL],
    "\U0001f600 \u00e9\u4e2d: {a}, [b]",
]


def test_a_report_of_hostile_texts_has_the_elements_of_any_other(tmp_path):
    plain_run, run = whole(tmp_path / "plain"), whole(tmp_path / EVIL.replace("/", "-"))
    where = (run, plain_run)
    for folder, text in zip(where, (EVIL, "text"), strict=True):
        log(folder, 30, (f"student/{text}", f"{text}/lr"))
        rows = [TEACHER | {"who": "teacher", "solver": text}, STUDENT, STUDENT | {"who": text}]
        measured(folder, rows, PROVENANCE | {text: text, "compared": {text: text}})
        (folder / "eval" / "tiny.json").rename(folder / "eval" / f"{text.replace('/', '-')}.json")
        for shelf in (folder / "samples" / "pictures").iterdir():
            drawn(shelf, {}, [text, text])
        (folder / "export" / "stepdistill.json").write_text(serving(prompts=(text,), model=text).to_json())
        (folder / "recipe.yaml").write_text(f"# {text}\n" + (folder / "recipe.yaml").read_text())
    pages = [Page(write([folder]).read_text(encoding="utf-8")) for folder in where]
    drop = {"g", "path", "use", "defs", "text", "tspan", "clippath", "rect"}  # of plots, whose texts have other lengths
    found = [[(tag, sorted(have)) for tag, have in made.found if tag not in drop] for made in pages]
    assert found[0] == found[1] and pages[0].text.count("alert(1)") > 10
    assert len(pages[0].all("script")) == 1 and "{{7*7}}" in pages[0].text
    assert not [have for _, have in pages[0].found if any(name.startswith("on") for name in have)]


@pytest.mark.parametrize("text", WORDS)
def test_a_literal_is_the_same_in_python_and_yaml(text):
    made = literal(text)
    assert eval(made) == text and made.isprintable()  # ours, and nobody else's
    if "\ud800" not in text:
        assert yaml.safe_load(made) == text


@pytest.mark.parametrize("text", [*WORDS, EVIL])
def test_a_card_of_a_hostile_prompt(text):
    told = serving(prompts=(text, text), model=text)
    made = card(told, [{"who": text, "fd": 1.0, "solver": EVIL}, {"fd": "x"}, {"alignment": []}, EVIL, None], gallery=["a.png"])
    front, _, body = made.removeprefix("---\n").partition("\n---\n")
    if "\ud800" not in text:
        assert yaml.safe_load(front)["widget"] == [{"text": text, "output": {"url": "a.png"}}]
    code = re.findall("^```python\n(.*?)^```$", body, re.DOTALL | re.MULTILINE)
    assert code[0].rstrip("\n") == snippet(told)
    compile(code[0].encode("utf-8", "surrogatepass").decode("utf-8", "replace"), "card", "exec")
    rest = re.sub(r"(`+) ?.*? ?\1", "", re.sub("^```python\n.*?^```$", "", body, flags=re.DOTALL | re.MULTILINE))
    assert "<script" not in rest.replace("\\<", "") and "onerror" not in re.sub(r"\\<img.*?\\>", "", rest)
    assert made.replace("\n", "").isprintable()


def test_words_in_markdown():
    assert plain("<b> [a](b) `c`\n# d") == r"\<b\> \[a\](b) \`c\` \# d" and plain("sgm_uniform 1.5") == "sgm_uniform 1.5"
    assert quoted("a\nb\x1b`c") == "`` a b `c ``"


def test_a_terminal_is_told_no_commands(capsys, tmp_path):
    assert printable(TERMINAL) == r"\x1b[2J\x1b]0;owned\x07\r\x9b31m\x00\u202eexe.gnp\u2066\ud800"
    assert (
        printable("caf\u00e9 \U0001f468\u200d\U0001f469\u3000\u00a0x\ty\n")
        == "caf\u00e9 \U0001f468\u200d\U0001f469\u3000\u00a0x\ty\n"
    )
    for live in (False, True):
        stream = io.StringIO()
        stream.isatty = lambda live=live: live
        line = Line(stream, 0)
        line(TERMINAL, final=True), line.say(TERMINAL), line.report(TERMINAL, 1, 1)
        assert stream.getvalue().replace("\r\x1b[K", "").replace("\n", "").isprintable()
    tell(TERMINAL)
    assert main(["report", str(tmp_path / "a\x1b[2Jb")]) == 2
    assert main(["cat", "x\x1b]0;y"]) == 2
    with pytest.raises(SystemExit):
        main(["ls", "recipes", "--\x1b[2J"])
    said = "".join(capsys.readouterr())
    assert "\x1b" not in said and r"a\x1b[2Jb" in said and said.replace("\n", "").isprintable()


def test_a_picture_of_no_kind_is_no_picture(tmp_path):
    """A name is no kind: what Pillow cannot read is left out."""
    run = whole(tmp_path / "run")
    for file in (run / "samples").rglob("*.png"):
        file.write_bytes(b"<svg onload=alert(1)>")
    made = Page(write([run]).read_text(encoding="utf-8"))
    assert not made.all("img") and "no picture" in made.text
    assert Image.MAX_IMAGE_PIXELS is not None
