"""What base-first sampling (arXiv:2503.10637) does to students of the embedded teachers: diversity, distance, alignment.

    stepdistill train quickstart
    stepdistill train quickstart name=dmd2_4steps strategy.steps=4
    stepdistill train quickstart name=dmd2_sd3 model.source=stepdistill/tiny-sd3 lora.rank=32 train.steps=300
    stepdistill train tscd_tiny_sd name=tscd
    python benchmarks/base_first.py runs/quickstart runs/dmd2_4steps runs/dmd2_sd3 runs/tscd

Each student in its own number of steps, with no step by its base model and with the first --first ones, guided as it was
distilled and unguided. Figures go into benchmarks/base_first.json after each run, beside those of other runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

from stepdistill.assemble import Distillation, restore
from stepdistill.evaluate.grid import teacher_scale
from stepdistill.evaluate.measure import collect, figures, make
from stepdistill.evaluate.presets import tiny_suite
from stepdistill.evaluate.provenance import checkout
from stepdistill.evaluate.walks import sampler, student_walk
from stepdistill.recipe import strategy_name
from stepdistill.sampling import base_first
from stepdistill.show import Line

REPO = Path(__file__).resolve().parent.parent
RESULTS = REPO / "benchmarks/base_first.json"
KEPT = ("n", "fd", "fd_low", "fd_high", "alignment", "diversity", "diversity_position", "diversity_size", "diversity_shade")


def measure(distillation: Distillation, first: int, scale: float, n: int, line: Line) -> dict[str, Any]:
    """The figures of n pictures, the first steps of which the base model takes."""
    how, wanted = base_first(distillation.inference(), first, scale), distillation.recipe.eval
    pictures = sampler(distillation, student_walk(distillation, how), wanted.seed, wanted.batch)
    label = f"{distillation.recipe.name}, {first} by the base, guided {scale:g}"
    suite = tiny_suite(n, shown=1, seed=wanted.seed)
    with tempfile.TemporaryDirectory() as kept:
        make(pictures, suite, Path(kept), lambda done, of: line.report(label, done, of))
        found = figures(suite, collect(suite, Path(kept)))
    nfe = how.nfe
    about = {"steps": len(how.hops), "first": first, "guidance": scale if first else None, "nfe": nfe}
    return about | {key: found[key] for key in KEPT}


def result(run: Path, firsts: list[int], n: int, commit: str, line: Line) -> dict[str, Any]:
    """The figures of a run, and what they are of."""
    distillation = restore(run)
    recipe, steps = distillation.recipe, len(distillation.inference().hops)
    scales = list(dict.fromkeys((teacher_scale(distillation), 1.0)))
    asked = [(0, 1.0), *((first, scale) for first in firsts if first < steps for scale in scales)]
    return {
        "model": recipe.model.source,
        "strategy": strategy_name(recipe.strategy),
        "iterations": recipe.train.steps,
        "renoise": distillation.inference().draws,
        "rows": [measure(distillation, first, scale, n, line) for first, scale in asked],
        "command": f"python benchmarks/base_first.py runs/{run.name} --first {' '.join(map(str, firsts))} --n {n}",
        "machine": f"{platform.machine()}, cores: {len(os.sched_getaffinity(0))}",
        "commit": commit,
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """The figures as Markdown."""
    head = ["run", "steps", "by the base", "evaluations", "FD (95 %)", "alignment", "diversity"]
    lines = [head, ["---"] * len(head)]
    for name, made in results.items():
        for row in made["rows"]:
            scale = "unguided" if row["guidance"] == 1 else f"guided {row['guidance']}"
            by = f"{row['first']}, {scale}" if row["first"] else "none"
            fd = f"{row['fd']:.2f} ({row['fd_low']:.2f} .. {row['fd_high']:.2f})"
            others = f"{row['alignment']:.1%}", f"{row['diversity']:.2f}"
            lines.append([f"`{name}`", str(row["steps"]), by, str(row["nfe"]), fd, *others])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run or export folders")
    parser.add_argument("--first", nargs="+", type=int, default=[1], metavar="K", help="steps that the base model takes (1)")
    parser.add_argument("--n", type=int, default=1024, help="pictures a figure (1024)")
    options, line, commit = parser.parse_args(), Line(), checkout()  # of the code that is loaded now
    for run in options.runs:
        made = result(run, options.first, options.n, commit, line)
        known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
        RESULTS.write_text(json.dumps(known | {run.name: made}, indent=1) + "\n")
    print(table(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
