"""Pages hold what was measured, and nothing else."""

import importlib.util
import json
from pathlib import Path

from stepdistill.listing import shipped

REPO = Path(__file__).resolve().parent.parent


def test_the_strategies_page_shows_the_measured_figures():
    spec = importlib.util.spec_from_file_location("benchmark", REPO / "benchmarks" / "strategies.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
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
