"""The command line: what it prints, and its exit status."""

import importlib
import inspect
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import stepdistill
from stepdistill import cli, verbs
from stepdistill.cli import main
from stepdistill.errors import Diverged, UserError
from stepdistill.families import FAMILIES
from stepdistill.listing import shipped
from stepdistill.recipe import load_recipe
from stepdistill.strategies import STRATEGIES

VERBS = (
    "train",
    "sample",
    "eval",
    "export",
    "pairs",
    "merge",
    "push",
    "validate",
    "plan",
    "ls",
    "cat",
    "cp",
    "explain",
    "doctor",
)


def run(capsys, *argv):
    """Exit status, standard output, standard error of a command."""
    try:
        status = main(argv)
    except SystemExit as error:
        status = error.code
    return status, *capsys.readouterr()


def test_help_names_every_verb(capsys):
    status, out, _ = run(capsys, "--help")
    assert status == 0
    assert all(f"\n    {verb} " in out for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_has_an_example_that_parses(capsys, verb):
    status, out, _ = run(capsys, verb, "--help")
    assert status == 0
    examples = out.split("example:\n")[1].strip().splitlines()
    for line in examples:
        words = shlex.split(line)
        assert words[:2] == ["stepdistill", verb]
        cli.build_parser().parse_known_args(words[1:])


def test_unknown_words_exit_2(capsys):
    assert run(capsys)[0] == 2
    assert run(capsys, "draw", "quickstart")[0] == 2
    status, _, err = run(capsys, "ls", "recipes", "more")
    assert (status, "unknown arguments: more" in err) == (2, True)
    assert "unknown arguments: --outptu" in run(capsys, "validate", "quickstart", "--outptu", "a=b")[2]
    assert "at least 1" in run(capsys, "sample", "runs/x", "--prompt", "x", "--steps", "0")[2]
    assert "at least 0" in run(capsys, "sample", "runs/x", "--prompt", "x", "--base-first-steps", "-1")[2]
    for text in ("0.9", "nan", "inf", "x"):
        asked = run(capsys, "sample", "runs/x", "--prompt", "x", "--base-first-steps", "1", "--base-guidance", text)
        assert asked[0] == 2 and f"{text} must be a number, at least 1" in asked[2]
    status, _, err = run(capsys, "sample", "runs/x", "--prompt", "x", "--base-guidance", "2")
    assert status == 2 and "--base-first-steps K gives to the base model; give both" in err
    assert "unknown format kohia" in run(capsys, "export", "runs/x", "--formats", "kohia")[2]


def test_ls(capsys):
    status, out, _ = run(capsys, "ls")
    assert status == 0
    for word in (*shipped(), *STRATEGIES, "StableDiffusionPipeline", "StableDiffusion3Pipeline"):
        assert f"  {word} " in out
    status, out, _ = run(capsys, "ls", "strategies")
    assert {line.split()[0] for line in out.splitlines()[1:]} == set(STRATEGIES)
    assert "arXiv:2310.04378" in out


def test_families_are_listed_as_they_are(capsys):
    """Read from the source, without importing any of it; here beside the classes."""
    _, out, _ = run(capsys, "ls", "families")
    rows = {line.split()[0]: line for line in out.splitlines()[1:]}
    assert set(rows) == set(FAMILIES)
    for name, kind in FAMILIES.items():
        assert (" videos " in rows[name], ", kohya " in rows[name]) == (kind.frames is not None, kind.kohya_prefix is not None)
        known = {True: " distilled guidance ", False: " guided "}.get(kind.guidance_distilled, " guided or distilled ")
        assert known in rows[name]


def test_cat_prints_the_file(capsys):
    assert run(capsys, "cat", "quickstart") == (0, shipped()["quickstart"].read_text(), "")


def test_cp(capsys, tmp_path):
    assert run(capsys, "cp", "quickstart", str(tmp_path))[0] == 0
    copy = tmp_path / "quickstart.yaml"
    assert copy.read_text() == shipped()["quickstart"].read_text()
    copy.write_text("mine")
    for dest in (copy, tmp_path):
        status, _, err = run(capsys, "cp", "quickstart", str(dest))
        assert (status, "is not overwritten" in err, copy.read_text()) == (2, True, "mine")
    assert "mkdir -p" in run(capsys, "cp", "quickstart", str(tmp_path / "no" / "x.yaml"))[2]
    status, _, err = run(capsys, "cp", "quikstart", str(tmp_path))
    assert (status, "did you mean 'quickstart'?" in err) == (2, True)


def test_ls_cat_cp_and_help_are_quick(tmp_path):
    """None of them imports torch, diffusers or yaml."""
    code = f"""
import sys
from stepdistill.cli import main
for argv in (["ls"], ["cat", "quickstart"], ["cp", "quickstart", {str(tmp_path)!r}]):
    assert main(argv) == 0
try:
    main(["train", "--help"])
except SystemExit as error:
    assert error.code == 0
import stepdistill
assert stepdistill.__version__
print(sorted({{"torch", "diffusers", "yaml", "numpy"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_explain(capsys, monkeypatch):
    for columns in (40, 80, 300):
        monkeypatch.setenv("COLUMNS", str(columns))
        for name in STRATEGIES:
            status, out, _ = run(capsys, "explain", name)
            assert status == 0
            assert "arXiv:" in out
            assert max(map(len, out.splitlines())) <= max(80, min(columns, 96))
    assert "  guidance        [6.0, 16.0]  " in run(capsys, "explain", "lcm")[1]
    status, _, err = run(capsys, "explain", "lmc")
    assert (status, err) == (2, "unknown strategy lmc; did you mean 'lcm'? (see: stepdistill ls strategies)\n")


@pytest.fixture
def anything_goes(monkeypatch):
    """Lets a recipe name teachers that are not there."""
    monkeypatch.setattr("stepdistill.sections.check_model", lambda *_: ())


def test_validate(capsys, anything_goes):
    status, out, _ = run(capsys, "validate", "quickstart", "train.steps=7")
    assert (status, "quickstart: in order (7 iterations" in out) == (0, True)
    assert (
        "critic (fake + head)" in run(capsys, "validate", "quickstart", "strategy.gan=1e-3", "data.images=stepdistill/tiny")[1]
    )
    status, out, err = run(capsys, "validate", "quickstart", "train.steps=0", "lora.rnk=3")
    assert (status, out, len(err.splitlines())) == (2, "", 2)
    assert "Traceback" not in err


def test_validate_takes_several(capsys, anything_goes, tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text("model: {source: x}\nlora: {rnak: 3}\n")
    status, out, err = run(capsys, "validate", "quickstart", str(bad), "nothing", "dmd2_tiny_sd", "optim.student_lr=0")
    assert (status, out) == (2, "")
    assert err.count("command line  optim.student_lr: 0 is out of range") == 1
    assert f"{bad}:2  lora.rnak" in err and "nothing: neither a file" in err
    status, out, err = run(capsys, "validate", "quickstart", str(bad), "train.steps=7", "dmd2_tiny_sd")
    assert (status, out.count(": in order (7 iterations")) == (2, 2)
    assert err.startswith(f"{bad}:") and "quickstart" not in err


def test_validate_is_quick():
    """It imports torch, for the strategies' modules, but nothing that loads networks: those take longer than torch."""
    code = """
import sys
from stepdistill.cli import main
assert main(["validate", "quickstart"]) == 0
print(sorted({"diffusers", "transformers", "peft"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_dry_run_prints_the_resolved_recipe_and_writes_nothing(capsys, anything_goes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, _ = run(capsys, "train", "quickstart", "--dry-run", "lora.rank=3", "--output", "there")
    assert (status, list(tmp_path.iterdir())) == (0, [])
    (tmp_path / "printed.yaml").write_text(out)  # what it prints is a recipe
    assert "  rank: 3\n" in out
    assert "LoRA of rank 3" in out
    assert "into there" in out
    assert run(capsys, "validate", "printed.yaml")[0] == 0


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (None, 0, ""),
        (UserError("no such thing; do that"), 2, "no such thing; do that\n"),
        (Diverged("critic", "the loss", 7, None), 3, "step 7: the loss of player critic"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_exit_status(capsys, monkeypatch, raised, status, said):
    def explain(args):
        if raised:
            raise raised

    monkeypatch.setattr(verbs, "explain", explain)
    got, out, err = run(capsys, "explain", "lcm")
    assert (got, out) == (status, "")
    assert said in err
    assert "Traceback" not in err


def test_a_fault_of_ours_is_not_hidden(monkeypatch):
    monkeypatch.setattr(verbs, "explain", lambda args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["explain", "lcm"])


def test_overrides_may_stand_anywhere(monkeypatch):
    seen = []
    monkeypatch.setattr(verbs, "pairs", lambda args: seen.append((args.recipe, args.overrides)))
    monkeypatch.setattr(verbs, "train", lambda args: seen.append((args.recipe, args.overrides, args.resume)))
    assert main(["train", "r", "a=1", "--resume", "never", "b=-2"]) == 0
    assert main(["pairs", "r", "a=1", "b=[1, 2]"]) == 0
    assert seen == [("r", ["a=1", "b=-2"], "never"), ("r", ["a=1", "b=[1, 2]"])]


@pytest.mark.parametrize(
    ("argv", "home", "given"),
    [
        (["train", "quickstart", "--resume", "never"], "runs.train", (load_recipe, None, "never")),
        (["sample", "a", "--prompt", "p", "--seed", "3"], "serve.sample_run", (Path("a"), "p", None, 3, None)),
        (
            ["sample", "a", "--prompt", "p", "--show-steps"],
            "stepwise.sample_stepwise",
            (Path("a"), "p", None, 0, None, 0, True, None),
        ),
        (
            ["sample", "a", "--prompt", "p", "--base-first-steps", "1", "--steps", "2", "--base-guidance", "1"],
            "stepwise.sample_stepwise",
            (Path("a"), "p", 2, 0, None, 1, False, 1.0),
        ),
        (
            ["sample", "a", "--prompt", "p", "--base-first-steps", "0"],
            "stepwise.sample_stepwise",
            (Path("a"), "p", None, 0, None, 0, False, None),
        ),
        (
            ["eval", "a", "--prompts", "p", "--n", "9", "--steps", "1,2", "--against", "teacher@4, none", "--batch", "7"],
            "evaluate.evaluation.evaluate_run",
            (Path("a"), None, Path("p"), None, 9, (1, 2), ("teacher@4", "none"), (), 7),
        ),
        (["export", "a", "--formats", "kohya,fused"], "export.export_run", (Path("a"), ("kohya", "fused"), None, None)),
    ],
)
def test_verbs_call_what_there_is(monkeypatch, anything_goes, argv, home, given):
    module, name = home.rsplit(".", 1)
    there = getattr(importlib.import_module(f"stepdistill.{module}"), name)
    seen = []
    monkeypatch.setattr(f"stepdistill.{home}", lambda *args: seen.append(args))
    assert main(argv) == 0
    inspect.signature(there).bind(*seen[0])
    assert seen == [tuple(value("quickstart") if value is load_recipe else value for value in given)]


def test_names_of_the_package():
    for name in stepdistill.__all__:
        assert getattr(stepdistill, name) is not None
        assert name in dir(stepdistill)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        stepdistill.nothing  # noqa: B018 - the access is the test


def test_diverged_names_the_checkpoint_even_if_it_is_learnt_later(tmp_path):
    error = Diverged("student", "the gradient of x", 3)
    assert "no checkpoint had been saved" in str(error)
    error.checkpoint = tmp_path
    assert str(tmp_path) in str(error)


def test_doctor(capsys):
    _, out, _ = run(capsys, "doctor")
    for word in ("python", "torch", "diffusers", "peft", "device", "cores", "memory", "disk", "pipelines"):
        assert f" {word} " in out
