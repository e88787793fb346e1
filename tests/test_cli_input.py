"""Whatever stands on a command line is answered in a line, before anything is started; and streams may be closed or narrow."""

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from stepdistill import cli, files, runs, show
from stepdistill.cli import main
from stepdistill.errors import UserError, one_line, printable
from stepdistill.serve import check_request, destination

ODD = [
    "",
    " ",
    "\n",
    ".",
    "/",
    "file",
    "folder",
    "run",
    "loop",
    "zero",
    "pipe",
    "nowhere",
    "nowhere/x",
    "file/x",
    "x" * 300,
    "x/" * 3000,
]
ODD += [
    "a\0b",
    "\udcff",
    "\x1b[31m",
    "\u202e",
    "é\U0001f600",
    "-",
    "--",
    "latin.yaml",
    "~",
    "~nobody",
    "*",
    "os:path",
    ":",
    "/dev/full",
]
NUMBERS = ["0", "-1", "nan", "inf", "", "9" * 5000, "1" + "0" * 20, "1.5e", "x", "0x1", "\udcff", "1,,nan", "1000001", " "]
RECIPE = [("cat",), ("explain",), ("explain", "--trust-remote-code"), ("validate",), ("train",), ("pairs",), ("ls",), ()]
RUN = [
    ("sample", "--prompt", "x"),
    ("eval",),
    ("export",),
    ("report",),
    ("push", "--repo", "org/name"),
    ("merge", "--out", "o.safetensors"),
]
OPTIONS = [
    ("sample", "run", "--prompt"),
    ("sample", "run", "--prompt", "x", "--out"),
    ("export", "run", "--out"),
    ("export", "run", "--formats"),
    ("merge", "file.safetensors", "--out"),
    ("merge", "file.safetensors", "--out", "o.safetensors", "--weights"),
    ("push", "run", "--repo"),
    ("push", "run", "--repo", "org/name", "--base"),
    ("eval", "run", "--preset"),
    ("eval", "run", "--features"),
    ("eval", "run", "--folder", "geneval", "--out", "o", "--prompts"),
    ("eval", "run", "--prompts", "file", "--out", "o", "--folder"),
    ("plan", "quickstart", "--gpu"),
    ("train", "quickstart", "--resume"),
]
COUNTS = [
    ("sample", "run", "--prompt", "x", "--steps"),
    ("sample", "run", "--prompt", "x", "--seed"),
    ("sample", "run", "--prompt", "x", "--base-first-steps"),
    ("sample", "run", "--prompt", "x", "--base-first-steps", "1", "--base-guidance"),
    ("eval", "run", "--n"),
    ("eval", "run", "--steps"),
    ("eval", "run", "--batch"),
    ("merge", "file.safetensors", "--out", "o.safetensors", "--rank"),
    ("merge", "file.safetensors", "--out", "o.safetensors", "--weights"),
    ("plan", "quickstart", "--gpu"),
]

FINE = {  # numbers that are in order
    "--seed": ("0", "-1", "1000001"),
    "--base-first-steps": ("0",),
    "--weights": ("0", "-1", "1" + "0" * 20, "1000001"),
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with odd things in it, where commands run and nothing can be started."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "assemble", lambda *_: pytest.fail("a run was started"))
    (tmp_path / "file").write_text("x\n")
    (tmp_path / "file.safetensors").write_text("x\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("model: [")
    (tmp_path / "latin.yaml").write_bytes(b"# caf\xe9\nmodel: {}\n")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "zero").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


def answer(argv):
    """The exit status of a command, and what it printed, as bytes of UTF-8 hold it."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)
    with redirect_stdout(out), redirect_stderr(out):
        try:
            status = main(argv)
        except SystemExit as error:
            status = error.code
    return status, out.buffer.getvalue().decode("utf-8")


@pytest.mark.parametrize("command", [*RECIPE, *RUN, *OPTIONS], ids=lambda words: " ".join(words) or "verb")
def test_odd_names_are_answered(place, command):
    """None of them is what it should be; `report` shows what is wrong with a run on its page, and `ls` and `cat` list."""
    before = sorted(place.rglob("*"))
    for odd in ODD[:: 6 if "--resume" in command else 1]:  # it draws the prompts of an evaluation each time
        argv = [command[0], odd, *command[1:]] if command in RUN else [*command, odd]
        if argv[:2] in (["cat", "file"], ["cat", "latin.yaml"], ["report", "run"], ["ls", "--"]):
            continue
        status, said = answer(argv)
        assert status == 2 and said.strip(), argv
        assert all(letter.isprintable() or letter in "\n\t" for letter in said), said
        assert "Traceback" not in said
    assert sorted(place.rglob("*")) == before, "something was written"


@pytest.mark.parametrize("command", COUNTS, ids=lambda words: " ".join(words))
def test_odd_numbers_are_answered(place, command):
    """A seed may be anything of 64 bits, all else is small; the run is none, which is what is said of numbers in order."""
    for odd in NUMBERS:
        status, said = answer([*command, odd])
        assert (status, "Traceback" in said) == (2, False), (odd, said)
        fine = odd in FINE.get(command[-1], ()) or (command[:1] == ("eval",) and not odd.strip())
        assert fine or command[-1] in said, (odd, said)


def test_overrides_beyond_reason_start_nothing(place):
    for override in (
        "train.steps=0",
        "train.steps=" + "9" * 9000,
        "=1",
        "a" * 9000 + "=1",
        "data.cache=zero",
        "pairs.folder=file/x",
    ):
        status, said = answer(["train", "quickstart", override])
        assert (status, said.count("\n")) == (2, 1), said
        assert said.startswith("command line  ") and len(said) < 2100


def test_validate_wants_a_recipe(place):
    assert "name a recipe" in answer(["validate", "lora.rank=3"])[1]


def test_a_report_is_written_over_no_other_file(place):
    status, said = answer(["report", "run", "--out", "file"])
    assert (status, (place / "file").read_text()) == (2, "x\n")
    assert "must end in .html" in said


def test_a_cache_that_is_no_folder(place):
    for name in ("file", "file/x", "zero", "loop", "pipe/a/b"):
        assert "is no folder; name another place" in answer(["validate", "quickstart", f"data.cache={name}"])[1]
    assert answer(["validate", "quickstart", "data.cache=folder/new/one"])[0] == 0


def test_errors_of_paths_that_no_check_foresaw(place, capsys, monkeypatch):
    def fail(number):
        def verb(_args):
            raise OSError(number, os.strerror(number), "some\x1bwhere")

        monkeypatch.setattr(cli.verbs, "ls", verb)
        return main(["ls"]), capsys.readouterr().err

    for number, remedy in files.REMEDIES.items():
        status, said = fail(number)
        assert (status, said.count("\n"), remedy in said) == (2, 1, True)
        assert said.startswith(r"some\x1bwhere: ")
    with pytest.raises(OSError, match="Cannot allocate"):
        fail(12)


def test_what_is_asked_of_a_sample(tmp_path):
    for prompt, said in {
        " \n": "is empty",
        "x" * 10_001: "at most 10,000",
        "\udcff": "half a character",
        "a\0": "cannot be",
    }.items():
        with pytest.raises(UserError, match=said) as caught:
            check_request(prompt, 0)
        assert len(str(caught.value)) < 300
    check_request("a\ttab, \x1b and é\U0001f600", -(2**63))
    for seed in (2**64, -(2**63) - 1):
        with pytest.raises(UserError, match="64-bit"):
            check_request("x", seed)
    (tmp_path / "there.png").mkdir()
    for out, said in {"there.png": "is no file", "no/x.png": "mkdir -p", "x": "must end in .png", "x.png.": "must end"}.items():
        with pytest.raises(UserError, match=said):
            destination(tmp_path / out, "", (".png",))


def test_a_place_that_may_not_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda place, mode: place != tmp_path)  # whoever runs the tests
    with pytest.raises(UserError, match="cannot be written"):
        destination(tmp_path / "x.png", "", (".png",))
    (tmp_path / "x.png").write_text("")
    assert destination(tmp_path / "x.png", "", (".png",)) == tmp_path / "x.png"


def test_messages_are_plain():
    assert printable("a\x1b[31m\u202e\udcff\x9b é\U0001f600\n\tb") == "a\\x1b[31m\\u202e\\udcff\\x9b é\U0001f600\n\tb"
    assert str(UserError("\x1b[2J")) == "\\x1b[2J"
    assert one_line("a\nb\tc\r") == r"a\nb\tc\r"
    assert len(one_line("x" * 10**6)) < 2100


def python(code, **kw):
    """A fresh interpreter, which has imported nothing heavy."""
    return subprocess.run([sys.executable, "-c", f"import sys, os\n{code}"], capture_output=True, **kw)


def test_a_reader_who_has_seen_enough():
    """As `stepdistill ls | head -1`: the pipe is closed before anything is written."""
    code = "r, w = os.pipe(); os.dup2(w, 1); os.close(r); os.close(w)\nfrom stepdistill.cli import main\nsys.exit(main(['ls']))"
    done = python(code)
    assert (done.returncode, done.stderr) == (141, b"")
    done = python(code.replace("os.dup2(w, 1)", "os.dup2(w, 1); os.dup2(w, 2)").replace("'ls'", "'cat', 'nothing'"))
    assert (done.returncode, done.stderr) == (141, b"")


def test_no_output_at_all():
    done = python("os.close(1)\nsys.stdout = None\nfrom stepdistill.cli import main\nsys.exit(main(['ls']))")
    assert (done.returncode, done.stderr) == (0, b"")
    done = python("sys.stderr = None\nfrom stepdistill.cli import main\nsys.exit(main(['cat', 'nothing']))")
    assert done.returncode == 2 and done.stdout.startswith(b"nothing: neither a file")  # said where there is somebody


def test_a_terminal_that_has_few_letters(tmp_path):
    recipe = tmp_path / "é.yaml"
    recipe.write_text("# é\U0001f600\n", encoding="utf-8")
    code = "from stepdistill.cli import main\nsys.exit(main(sys.argv[1:]))"
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}", "cat", str(recipe)], capture_output=True, env=environment, check=True
    )
    assert done.stdout == b"# \\xe9\\U0001f600\n"


class Full(io.StringIO):
    def flush(self):
        raise OSError(28, "No space left on device")


def test_work_goes_on_when_nobody_watches():
    read, write = os.pipe()
    line = show.Line(os.fdopen(write, "w"), every=0)
    os.close(read)
    line("one"), line.say("two"), line("three", final=True)
    assert Path(line.stream.name) == Path(os.devnull)
    with pytest.raises(OSError, match="No space left"):  # which is another matter
        show.Line(Full()).say("four")
