"""Pages hold what was measured, and nothing else."""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import torch
import yaml
from networks import Promoted, build, exact, normal

from stepdistill.cli import build_parser
from stepdistill.fields import fields_of
from stepdistill.listing import shipped
from stepdistill.lora_sources import split_scale
from stepdistill.sections import Model, Optim, Train

REPO = Path(__file__).resolve().parent.parent


def load(name: str):
    """A module of benchmarks/."""
    spec = importlib.util.spec_from_file_location(name, REPO / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_strategies_page_shows_the_measured_figures():
    benchmark = load("strategies")
    results = json.loads(benchmark.RESULTS.read_text())
    assert set(results) == set(benchmark.RECIPES) <= set(shipped())
    assert benchmark.table(results) in benchmark.PAGE.read_text(encoding="utf-8")
    for name, made in results.items():  # what a recipe's header says of its own student
        best = made["students"][str(made["steps"])]
        if name != "quickstart":
            assert f"FD {best['fd']:.2f} ({best['fd_low']:.2f} .. {best['fd_high']:.2f})" in " ".join(header(name).split())


def header(name: str) -> str:
    """The comment that a shipped recipe begins with."""
    lines = shipped()[name].read_text(encoding="utf-8").splitlines()
    return "\n".join(line.lstrip("# ") for line in lines[: next(k for k, line in enumerate(lines) if line and line[0] != "#")])


def test_the_derivatives_page_is_right():
    """Its code runs in the order in which it stands, on a tiny network, and gives what PyTorch's own mathematics does."""
    page = (REPO / "docs" / "jvp.md").read_text(encoding="utf-8")
    net, _, (x, t), (v, _) = build("sd3")
    said = {"net": net, "x": x, "t": t, "v": v, "text": normal(2, 6, 32), "pooled": normal(2, 32), "torch": torch}
    heads = {name: normal(1, 2, 5, 8, seed=i) for i, name in enumerate(("q", "k", "v", "tq", "tk", "tv"))}
    with Promoted():
        for code in re.findall("```python\n(.*?)```", page, re.DOTALL):
            exec(code, heads if "attention_jvp" in code else said)
        value, slope = exact(said["f"], (x, t), (v, torch.ones_like(t)))
    torch.testing.assert_close(said["value"], value, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(said["slope"], slope, rtol=1e-8, atol=1e-10)
    assert said["calls"] == {"111": 3} and heads["to"].any()


def test_the_derivatives_page_shows_the_measured_cost():
    benchmark = load("jvp_cost")
    results = json.loads(benchmark.RESULTS.read_text())
    assert benchmark.table(results) in benchmark.PAGE.read_text(encoding="utf-8")
    for made in results.values():
        assert made["parameters"] >= 20e6 and made["quotient"]["median"] <= 4


def test_the_page_of_exports_names_what_there_is():
    """Its commands parse, its recipe key exists, and its lines for diffusers are those of the card."""
    page = (REPO / "docs" / "exports.md").read_text(encoding="utf-8")
    commands = re.findall("^(stepdistill .*)$", page, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        _, rest = build_parser().parse_known_args(shlex.split(command)[1:])
        assert not rest
    (keys,) = (yaml.safe_load(code)["model"] for code in re.findall("```yaml\n(.*?)```", page, re.DOTALL))
    assert keys.keys() <= fields_of(Model).keys() and [split_scale(text)[1] for text in keys["loras"]] == [0.8, 1.0]
    assert 'pipe.set_adapters(["few_step", "style"], [1.0, 0.7])' in page


def test_each_line_of_the_security_page_names_a_test_that_there_is():
    page = (REPO / "docs" / "security.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith(("| what", "| ---"))]
    assert len(rows) >= 30
    for row in rows:
        what, trusted, happens, test = (cell.strip() for cell in row.strip("|").split(" | "))
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", test)
        assert what and trusted.startswith(("yes", "no")) and happens and named, row
        for file, name in named:
            assert re.search(rf"^def {name}\(", (REPO / file).read_text(encoding="utf-8"), re.MULTILINE), (file, name)


def test_every_fault_that_is_told_has_its_test_and_the_soak_its_figures():
    page = (REPO / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page)
    lines = page.split("# What was tried")[1].splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.startswith(("| fault |", "| --- |"))]
    assert len(named) == len(rows) > 10
    assert all(re.search(r"\| [\d,]+[^|]* \|$", line) for line in rows)  # repetitions
    for file, test in named:
        assert f"def {test}(" in (REPO / file).read_text(encoding="utf-8"), (file, test)
    made = json.loads(load("soak").RESULTS.read_text())
    assert made["flat"] and made["constant"] and made["minutes"] >= 20
    for what in ("memory", "heap"):
        low, high = (f"{made[what][end]:+.{2 if what == 'heap' else 1}f}" for end in ("low", "high"))
        assert f"({low} .. {high})" in page


def test_the_page_of_several_gpus_shows_what_was_measured_and_its_commands_parse():
    benchmark = load("scale")
    results = json.loads(benchmark.RESULTS.read_text())
    assert json.loads(json.dumps(benchmark.compute(results["measured"], results["counted"]))) == results["computed"]
    page = benchmark.PAGE.read_text(encoding="utf-8")
    assert benchmark.table(results) in page
    commands = re.findall(r"-m (stepdistill train .*)$", page, re.MULTILINE)
    assert len(commands) == 5
    for command in commands:
        assert build_parser().parse_args(shlex.split(command)[1:]).recipe == "my.yaml"
    for key in re.findall(r"`(train|optim)\.(\w+)`", page):
        section = {"train": Train, "optim": Optim}[key[0]]
        assert key[1] in fields_of(section), key
