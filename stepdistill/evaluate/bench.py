"""The bench: candidates, one after the other, through one suite; rows of the table come out.

Any number of processes may stand at it; the first one computes and writes. What was kept of a candidate's pictures lies in
folder/kept until its row is written.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import distributed
from ..assemble import Distillation
from ..data.texts import Texts
from ..show import Line
from . import pictures
from .candidates import Candidate
from .measure import Sampler, Suite, collect, figures, make
from .meters import Figures, fidelity
from .provenance import digest, machine
from .speed import speed
from .walks import sampler

Row = dict[str, Any]  # the fields of Candidate.about, figures, `speed`, a key, and:
APART, MACHINE = "apart_from", "machine"  # whom `fidelity` is to; of which machine ms and memory are


@dataclass(frozen=True)
class Bench:
    distillation: Distillation
    suite: Suite
    folder: Path  # RUN/eval
    line: Line
    batch: int  # pictures sampled at a time
    texts: Texts

    @property
    def shown(self) -> Path:
        return self.folder / "pictures"

    def key(self, candidate: Candidate) -> str:
        """Changes with all that decides a candidate's figures, its weights included."""
        return digest([self.suite.compared, candidate.about, candidate.weights])

    def kept(self, candidate: Candidate) -> Path:
        return self.folder / "kept" / self.suite.name / self.key(candidate)

    def sampler(self, candidate: Candidate) -> Sampler:
        seed = self.distillation.recipe.eval.seed
        return sampler(self.distillation, candidate.walk, seed, self.batch, self.texts)


def row(bench: Bench, candidate: Candidate, teacher: Candidate, known: Mapping[str, Any] | None) -> Row:
    """One row, in the first process; an empty one in the others, which only help to make pictures.

    teacher: whom its first pictures are compared with. known: its figures, if they need not be measured; but how far it is
    from another teacher, and how quick on another machine, is.
    """
    if known is None:
        draw(bench, candidate)
    found: Row = {}
    if first():
        found = {**(known or figures_of(bench, candidate)), **candidate.about, "key": bench.key(candidate)}
        if found.get(APART) != full_name(teacher):
            found = {name: x for name, x in found.items() if not name.startswith("fidelity")} | apart(bench, candidate, teacher)
        here = machine(bench.distillation.roles.teacher.net.device)
        if found.get(MACHINE) != here:
            found |= {**speed_of(bench, candidate), MACHINE: here}
    distributed.wait()
    return found


def draw(bench: Bench, candidate: Candidate) -> None:
    """Make and keep what the suite asks for."""

    def progress(done: int, of: int) -> None:
        if first():
            bench.line.report(f"evaluating: {candidate.label}", done, of)

    make(bench.sampler(candidate), bench.suite, bench.kept(candidate), progress)


def figures_of(bench: Bench, candidate: Candidate) -> Figures:
    """Of what was kept; the first pictures become files."""
    kept = collect(bench.suite, bench.kept(candidate))
    if bench.suite.shown:
        show(bench, candidate, kept["shown"]["pictures"])
    return figures(bench.suite, kept)


def apart(bench: Bench, candidate: Candidate, teacher: Candidate) -> Row:
    """How far a candidate's first pictures are from the teacher's of the same noise, and which teacher that is."""
    if not (n := bench.suite.shown):
        return {}
    own, other = (first_pictures(bench, one, n) for one in (candidate, teacher))
    device = bench.distillation.roles.teacher.net.device
    return {**fidelity(own, other, lpips=bench.suite.name != "tiny", device=device), APART: full_name(teacher)}


def full_name(teacher: Candidate) -> str:
    """The teacher's name with all that tells one from another of the same weights, whose hash is in a row's key."""
    return f"{teacher.label}, {teacher.solver}"


def first_pictures(bench: Bench, candidate: Candidate, n: int) -> np.ndarray:
    """A candidate's first n pictures, from their files if they are there."""
    folder, key = bench.shown / candidate.folder, bench.key(candidate)
    if (made := pictures.load(folder, n, key)) is None:
        bench.line.say(f"{candidate.label}: drawing the first {n} pictures, to compare with")
        made = bench.sampler(candidate)(bench.suite.sets["plain"].prompts[:n], 0)
        show(bench, candidate, made)
    return made


def show(bench: Bench, candidate: Candidate, made: np.ndarray) -> None:
    """Keep a candidate's first pictures as files, and their prompts."""
    prompts, seed = bench.suite.sets["plain"].prompts[: len(made)], bench.distillation.recipe.eval.seed
    pictures.save_prompts(bench.shown, prompts, seed)
    pictures.save(bench.shown / candidate.folder, made, bench.key(candidate))


def speed_of(bench: Bench, candidate: Candidate) -> dict[str, float]:
    """Of one picture of the first prompt, which is encoded beforehand."""
    distillation, prompt = bench.distillation, bench.suite.sets["plain"].prompts[0]
    one = sampler(distillation, candidate.walk, 0, 1, Texts(distillation.family, [prompt]))
    return speed(lambda k: one([prompt], k), distillation.roles.teacher.net.device)


def best_solver(bench: Bench, rivals: Mapping[str, Candidate]) -> tuple[str, dict[str, float]]:
    """The solver with the lowest FD of a quarter of the pictures, and what each got."""
    tried = {}
    for solver, candidate in rivals.items():
        draw(bench, candidate)
        tried[solver] = figures(bench.suite, collect(bench.suite, bench.kept(candidate)))["fd"]
    return min(tried, key=tried.get), tried


def clear(bench: Bench) -> None:
    """Forget what was kept: every row is written."""
    if first():
        shutil.rmtree(bench.folder / "kept" / bench.suite.name, ignore_errors=True)
        with suppress(OSError):  # another suite's are there
            (bench.folder / "kept").rmdir()


def first() -> bool:
    return distributed.rank() == 0
