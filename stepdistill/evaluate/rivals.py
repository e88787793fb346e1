"""The teachers that stand beside a student, each with its best solver."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..tiny.judge import FEATURES
from .bench import Bench, best_solver
from .candidates import USUAL, Candidate, read_against, teacher
from .frechet import needed
from .grid import teacher_scale
from .presets import tiny_suite
from .walks import SOLVERS

STEPS = (25, 4, 2, 1)
Best = Mapping[tuple[int, float], str]  # (steps, guidance) -> the best solver, where it is known


def best_known(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[int, float], str]:
    """From rows of teachers whose solvers were compared: one that was only asked for need not be best."""
    return {(row["steps"], row["guidance"]): row["solver"] for row in rows if "tried" in row}


def asked_for(bench: Bench, words: Sequence[str], best: Best) -> Iterator[tuple[Candidate, dict[str, Any]]]:
    """The teachers of words like teacher@25 (`none` is nobody), with no more to tell."""
    for word in words:
        if word != "none":
            yield read_against(bench.distillation, word, best), {}


def of_the_world(bench: Bench, best: Best) -> Iterator[tuple[Candidate, dict[str, Any]]]:
    """Of the embedded world: 25, 4, 2 and 1 steps, guided and not, each with its best solver.

    Where that is not known, it is found with a quarter of the pictures; `tried` holds their FD, by solver.
    """
    for steps in STEPS:
        for guidance in dict.fromkeys((float(teacher_scale(bench.distillation)), 1.0)):
            rivals = {solver: teacher(bench.distillation, steps, guidance, solver) for solver in SOLVERS}
            if (steps, guidance) in best:
                yield rivals[best[steps, guidance]], {}
            else:
                n = max(bench.suite.n // 4, needed(FEATURES))
                small = replace(bench, suite=tiny_suite(n, captions=0, shown=0, seed=bench.distillation.recipe.eval.seed))
                solver, tried = best_solver(small, rivals)
                yield rivals[solver], {"tried": tried}


def nearest(bench: Bench, rivals: Sequence[Candidate], best: Best) -> Candidate:
    """Whom pictures of the same noise are compared with: of the guided rivals the one with the most steps; else 25 steps."""
    scale = float(teacher_scale(bench.distillation))
    ranked = sorted(rivals, key=lambda one: (one.guidance == scale, one.steps))
    return ranked[-1] if ranked else teacher(bench.distillation, 25, scale, best.get((25, scale), USUAL))
