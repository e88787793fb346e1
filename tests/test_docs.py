"""Pages hold what was measured, and nothing else."""

import importlib.util
import json
import re
from pathlib import Path

import torch
from networks import Promoted, build, exact, normal

from stepdistill.listing import shipped

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
