"""Every strategy on the embedded teacher, from its short recipe: trains, measures, and writes docs/strategies.md's table.

    python benchmarks/strategies.py              # all; those that are finished are not trained again
    python benchmarks/strategies.py vsd_tiny_sd  # these, into the same table

Runs lie in build/strategies/<recipe>; figures in benchmarks/strategies.json after each run; the picture in docs/strategies.png.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from stepdistill.assemble import restore
from stepdistill.evaluate.grid import Samples, draw_grid, plural
from stepdistill.evaluate.shipped import shipped
from stepdistill.evaluate.walks import student_walk
from stepdistill.recipe import load_recipe, strategy_name
from stepdistill.runs import Run
from stepdistill.show import Line, clock

REPO = Path(__file__).resolve().parent.parent
RUNS, RESULTS = REPO / "build/strategies", REPO / "benchmarks/strategies.json"
PAGE, PICTURE = REPO / "docs/strategies.md", REPO / "docs/strategies.png"
BEGIN, END = "<!-- made by benchmarks/strategies.py -->", "<!-- end of what was made -->"
RECIPES = (
    "lcm_tiny_sd_short",
    "tscd_tiny_sd",
    "scm_tiny_sd",
    "rcm_tiny_sd",
    "boot_tiny_sd",
    "reflow_tiny_sd",
    "dmd_tiny_sd",
    "quickstart",
    "decoupled_dmd_tiny_sd",
    "phased_dmd_tiny_sd",
    "vsd_tiny_sd",
    "f_distill_tiny_sd",
)
STEPS = (1, 2, 4)


def measure(name: str, known: dict | None) -> dict:
    """Train a recipe in a process of its own, pairs before that in another; returns its figures (the known ones, if it is
    trained already)."""
    run, recipe, pairs = RUNS / name, load_recipe(name), RUNS / f"{name}-pairs"
    more = [f"pairs.folder={pairs}"] if "pairs" in recipe.strategy.needs else []
    if known and (run / "recipe.yaml").is_file() and Run(run).finished(load_recipe(name, more)):
        return known
    before = time.monotonic()
    if more:
        command("pairs", name, "--out", str(pairs))
    spent = time.monotonic() - before
    memory = command("train", name, *more, "--output", str(run))
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    table = json.loads((run / "eval/tiny.json").read_text())
    students = {row["steps"]: row for row in table["rows"] if row["who"] == "student"}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=REPO, capture_output=True, text=True, check=True)
    return {
        "strategy": strategy_name(recipe.strategy),
        "steps": getattr(recipe.strategy, "steps", 1),
        "iterations": recipe.train.steps,
        "seconds": spent + log[-1]["seconds"],
        "memory_mb": memory,
        "students": {n: row for n, row in students.items() if n in STEPS},
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "commit": commit.stdout.strip(),
    }


def command(*words: str) -> float:
    """Run `stepdistill` with these words; returns its peak memory in MB."""
    child = subprocess.Popen([sys.executable, "-m", "stepdistill", *words], cwd=REPO)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"stepdistill {' '.join(words)}: exit status {os.waitstatus_to_exitcode(status)}")
    return usage.ru_maxrss / 1024


def teacher(name: str) -> dict[int, list[dict]]:
    """The shipped rows of a recipe's teacher, by number of steps."""
    rows = shipped(load_recipe(name).model.source)["rows"]
    return {n: [row for row in rows if row["steps"] == n] for n in STEPS}


def wins(row: dict, rivals: list[dict]) -> bool:
    """Whether a student beats the teacher in as many steps, guided or not: at its interval's bad end, and in alignment."""
    return all(row["fd_high"] < rival["fd"] and row["alignment"] > rival["alignment"] for rival in rivals)


def cell(row: dict | None) -> str:
    if row is None:
        return "-"
    return (
        f"**{row['fd']:.2f}** ({row['fd_low']:.2f} .. {row['fd_high']:.2f})<br>{row['alignment']:.1%}, {row['diversity']:.2f}"
    )


def table(results: dict[str, dict]) -> str:
    """The figures as Markdown."""
    head = ["strategy, recipe", *(plural(n) for n in STEPS), "beats the teacher", "training", "peak memory"]
    lines = [head, ["---"] * len(head)]
    rivals = teacher(next(iter(results)))
    for k, who in enumerate(("teacher, unguided", "teacher, guided:<br>twice the evaluations")):
        rows = [sorted(rivals[n], key=lambda row: row["guidance"])[k] for n in STEPS]
        lines.append([who, *map(cell, rows), "", "", ""])
    for name in (name for name in RECIPES if name in results):
        made = results[name]
        rows = {int(n): row for n, row in made["students"].items()}
        won = wins(rows[made["steps"]], rivals[made["steps"]])
        told = f"{'yes' if won else 'no'}, in {made['steps']}"
        spent = f"{clock(made['seconds'])}<br>{made['iterations']} iterations"
        figures = [cell(rows.get(n)) for n in STEPS]
        lines.append([f"`{made['strategy']}`<br>`{name}`", *figures, told, spent, f"{made['memory_mb']:.0f} MB"])
    first = next(iter(results.values()))
    commits = ", ".join(sorted({made["commit"] for made in results.values()}))
    notes = (
        "**FD** (its 95 % interval; lower is better), alignment, diversity (1 is the drawings'), over 2,048 pictures. A "
        "student beats the teacher, in its own number of steps, if its interval's bad end lies below the teacher's FD, guided "
        "and not, and its alignment above. Training: its loop, and before that the making of pairs where there are some. "
        f"Machine: {first['machine']}. Commits: {commits}."
    )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{notes}"


def picture(results: dict[str, dict]) -> None:
    """The same prompts and noise for every student, in its own number of steps, below the teacher's 25."""
    rows = []
    for name in (name for name in RECIPES if name in results):
        distillation = restore(RUNS / name)
        samples = Samples(distillation, RUNS / name, Line())
        if not rows:
            rows.append(("teacher\n25 steps, guided\n50 evaluations", samples.pictures(samples.teacher_walk(25))))
        steps = results[name]["steps"]
        made = samples.pictures(student_walk(distillation, distillation.inference(steps)))
        rows.append((f"{name.replace('_tiny_sd', '')}\n{plural(steps)}\n{clock(results[name]['seconds'])} of training", made))
    draw_grid(rows, samples.prompts).save(PICTURE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=RECIPES, metavar="RECIPE", help=", ".join(RECIPES))
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name in parser.parse_args().recipes:
        results[name] = measure(name, results.get(name))
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(results)}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")
    picture(results)


if __name__ == "__main__":
    main()
