"""The table at the end of a run: the teacher with stock solvers, guided and not, against the student."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from .. import __version__
from ..assemble import Distillation, restore
from ..show import Line
from ..sources import EMBEDDED_DATA
from .grid import plural, teacher_scale
from .shipped import shipped
from .tiny import DIVERSITY_CAPTIONS, evaluate_tiny, floor
from .walks import SOLVERS, Walk, sampler, student_walk, teacher_walk

TEACHER_STEPS = (25, 4, 2, 1)
Row = dict[str, Any]  # who, steps, nfe, guidance, solver, ms, and the fields of evaluate.tiny.Result


def evaluate(distillation: Distillation, folder: Path, line: Line) -> list[Row]:
    """Measure the student, and the teacher unless its figures ship with the package; print and write folder/table.json."""
    recipe = distillation.recipe
    if recipe.data.prompts != EMBEDDED_DATA:
        line.say(f"no table: figures are measured on the embedded world (data.prompts: {EMBEDDED_DATA}) only")
        return []
    if distillation.family.frames is not None:
        line.say("no table: figures are of pictures, and this student makes videos")
        return []
    rows = None if recipe.model.loras else shipped(recipe.model.source, recipe.eval.n)
    if rows is None:
        line.say("the teacher's figures do not ship for this model: measuring them (25 steps take the most)")
        rows = list(teacher_rows(distillation, teacher_scale(distillation), recipe.eval.n, line))
    for n in distillation.counts:
        walk = student_walk(distillation, distillation.inference(n))
        about = {"who": "student", "steps": n, "nfe": n, "guidance": 1.0, "solver": ""}
        rows.append(about | measure(distillation, walk, f"student, {plural(n)}", line, recipe.eval.n))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.json").write_text(json.dumps({"rows": rows, "provenance": provenance(distillation)}, indent=1))
    line.say(render(rows, floor(recipe.eval.n)[0]))
    return rows


def evaluate_run(run: Path) -> list[Row]:
    """`stepdistill eval RUN`: the table of a run's newest checkpoint.

    Raises:
        UserError: the folder is no run, or has no checkpoint.
    """
    return evaluate(restore(run), run / "eval", Line())


def teacher_rows(distillation: Distillation, scale: float, n: int, line: Line) -> Iterator[Row]:
    """The teacher at 25, 4, 2 and 1 steps, guided at scale and unguided, each with its best solver; fewest steps first.

    The best is the one with the lowest FD of a quarter of the pictures; `tried` holds those.
    """
    for steps in sorted(TEACHER_STEPS):
        for guidance in dict.fromkeys((scale, 1.0)):
            yield teacher_row(distillation, steps, guidance, n, line)


def teacher_row(distillation: Distillation, steps: int, guidance: float, n: int, line: Line) -> Row:
    label = f"teacher, {plural(steps)}, guided {guidance:g}"
    walks = {solver: teacher_walk(distillation, solver, steps, guidance) for solver in SOLVERS}
    tried = {
        solver: measure(distillation, walk, f"{label}, {solver}", line, n // 4, diverse=False)["fd"]
        for solver, walk in walks.items()
    }
    best = min(tried, key=tried.get)
    nfe = steps if guidance == 1 else 2 * steps
    about = {"who": "teacher", "steps": steps, "nfe": nfe, "guidance": guidance, "solver": best, "tried": tried}
    return about | measure(distillation, walks[best], f"{label}, {best}", line, n)


def measure(distillation: Distillation, walk: Walk, label: str, line: Line, n: int, diverse: bool = True) -> Row:
    """Sample and judge n pictures, with the milliseconds that one took (in a batch of eval.batch, decoding included)."""
    recipe, spent = distillation.recipe, []
    pictures = sampler(distillation, walk, recipe.eval.seed, recipe.eval.batch)

    def timed(captions: list[str], first: int) -> np.ndarray:
        began = time.perf_counter()
        images = pictures(captions, first)
        spent.append((time.perf_counter() - began) / len(captions))
        return images

    result = evaluate_tiny(
        timed,
        n,
        diversity_captions=DIVERSITY_CAPTIONS if diverse else 0,
        progress=lambda done, of: line.report(f"evaluating: {label}", done, of),
        batch=recipe.eval.batch,
    )
    return {"ms": 1000 * float(np.median(spent)), **result.to_dict()}


def render(rows: list[Row], least: float) -> str:
    """The table as text."""
    head = f"{'':<30}{'evaluations':>12}{'FD':>9}{'95 % interval':>20}{'alignment':>11}{'diversity':>11}{'ms/image':>10}"
    lines = ["", head, "-" * len(head)]
    for row in sorted(rows, key=lambda row: (row["who"] == "student", -row["steps"], -row["guidance"])):
        name = f"{row['who']}, {plural(row['steps'])}"
        name += "" if row["who"] == "student" else f", guided {row['guidance']:g}" if row["guidance"] != 1 else ", unguided"
        span = f"{row['fd_low']:.2f} .. {row['fd_high']:.2f}"
        spread = "-" if row["diversity"] is None else f"{row['diversity']:.2f}"
        lines.append(
            f"{name:<30}{row['nfe']:>12}{row['fd']:>9.2f}{span:>20}{row['alignment']:>10.1%}{spread:>12}{row['ms']:>10.1f}"
            + (f"  {row['solver']}" if row["solver"] else "")
        )
    lines += [
        "-" * len(head),
        f"FD: Frechet distance to drawings of the same captions; {least:.2f} is the floor (other drawings). Lower is better.",
        "Evaluations: network calls a picture; guidance counts twice. The teacher's rows show its best solver.",
        "Alignment: share of what the captions state that a judge reads in the pictures. Diversity: 1 is the drawings'.",
    ]
    return "\n".join(lines)


def provenance(distillation: Distillation) -> dict[str, Any]:
    """What a figure depends on besides the weights."""
    return {
        "stepdistill": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "machine": f"{platform.machine()} {distillation.roles.teacher.net.device.type}, {torch.get_num_threads()} threads",
        "model": distillation.recipe.model.source,
        "noise": f"by picture index, seed {distillation.recipe.eval.seed}",
        "reference": "10,000 drawings, features of the embedded judge",
    }
