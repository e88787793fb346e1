"""Who is measured: the student in some number of steps, and the teacher with a stock solver, guided or not. Plain data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..assemble import Distillation
from ..errors import UserError
from ..lora_sources import find_lora, identities
from ..sources import embedded_models, identity
from .grid import plural, teacher_scale
from .provenance import digest
from .shipped import key
from .walks import Walk, student_walk, teacher_walk

SOLVER_WORDS = {"ddim": "first order", "euler": "first order", "dpm": "DPM-Solver++", "unipc": "UniPC"}  # of --against
USUAL = "UniPC"  # the solver that is best for most teachers at most numbers of steps


@dataclass(frozen=True)
class Candidate:
    who: str  # student or teacher
    steps: int
    nfe: int  # network evaluations of a picture
    guidance: float  # 1: unguided
    solver: str  # of SOLVERS; "" for a student, which has its own way
    weights: str  # changes when its weights do
    walk: Walk

    @property
    def about(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("who", "steps", "nfe", "guidance", "solver")}

    @property
    def label(self) -> str:
        return label(self.about)

    @property
    def folder(self) -> str:
        """Of its pictures."""
        unguided = "-unguided" * (self.who == "teacher" and self.guidance == 1)
        return f"{self.who}-{self.steps}steps{unguided}"


def label(row: dict[str, Any]) -> str:
    """Who is measured, in words, from the fields of a candidate."""
    name = f"{row['who']}, {plural(row['steps'])}"
    guided = f", guided {row['guidance']:g}" if row["guidance"] != 1 else ", unguided"
    return name + guided * (row["who"] == "teacher")


def student(distillation: Distillation, steps: int | None = None) -> Candidate:
    """The student in that many steps (None: those it was made for), with its average where there is one.

    Raises:
        UserError: it cannot be sampled in that many steps.
    """
    how, roles = distillation.inference(steps), distillation.students()
    drawn = {name: p for hop in how.hops for name, p in _named(hop.role, roles[hop.role].named_parameters())}
    weights = digest([source(distillation), fingerprint(drawn.items()), repr(how)])
    return Candidate("student", len(how.hops), how.nfe, 1.0, "", weights, student_walk(distillation, how))


def teacher(distillation: Distillation, steps: int, guidance: float, solver: str = USUAL) -> Candidate:
    """The teacher; guidance 1 is unguided."""
    nfe = steps if guidance == 1 else 2 * steps
    walk = teacher_walk(distillation, solver, steps, guidance)
    return Candidate("teacher", steps, nfe, float(guidance), solver, digest(source(distillation)), walk)


def read_against(distillation: Distillation, word: str, best: Mapping[tuple[int, float], str]) -> Candidate:
    """The teacher of a word like teacher@25, teacher@4:unguided, teacher@4:dpm or teacher@8:7.5:ddim.

    best: by steps and guidance the solvers that are known to be best; others get the usual one.

    Raises:
        UserError: the word means nothing, or this teacher takes no guidance.
    """
    who, *options = word.split(":")
    head, _, steps = who.partition("@")
    scale, solver = teacher_scale(distillation), None
    fine = head == "teacher" and steps.isdecimal() and 1 <= int(steps) <= 1000
    for option in options:
        if option in SOLVER_WORDS:
            solver = SOLVER_WORDS[option]
        elif option == "unguided":
            scale = 1.0
        elif option.replace(".", "", 1).isdecimal() and 1 <= float(option) <= 1000:
            scale = float(option)
        else:
            fine = False
    if not fine:
        raise UserError(
            f"--against {word} names no teacher; write teacher@STEPS, and if wanted :unguided or :SCALE, and a solver of "
            f"{', '.join(f':{name}' for name in SOLVER_WORDS)}, as in teacher@25 or teacher@4:unguided:dpm"
        )
    if scale != 1 and distillation.family.guidance_distilled:
        raise UserError(f"--against {word}: this teacher's guidance is distilled, so it takes no scale; write teacher@{steps}")
    return teacher(distillation, int(steps), scale, solver or best.get((int(steps), float(scale)), USUAL))


def source(distillation: Distillation) -> dict[str, Any]:
    """What the teacher is, so that another one is told from it: of folders and files, their sizes and times."""
    model = distillation.recipe.model
    known = embedded_models().get(model.source)
    about = {"source": identity(model.source), "revision": model.revision, "variant": model.variant, "dtype": model.dtype}
    about |= {"quantize": model.quantize, "loras": identities(model.loras), "precision": distillation.recipe.train.precision}
    if known:
        about["files"] = key(known)
    elif (folder := Path(model.source)).is_dir():
        about["files"] = [(str(file.relative_to(folder)), *stamp(file)) for file in sorted(folder.rglob("*.safetensors"))]
    about["lora_files"] = [stamp(path) for lora in map(find_lora, model.loras) if (path := lora.path)]
    return about


def stamp(file: Path) -> tuple[int, int]:
    """Size and time of a file: they change when it does."""
    about = file.stat()
    return about.st_size, about.st_mtime_ns


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 of the names and values of tensors."""
    seen = hashlib.sha256()
    for name, x in sorted(tensors, key=lambda pair: pair[0]):
        flat = x.detach().flatten().cpu().contiguous()
        seen.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        seen.update(flat.view(torch.uint8).numpy().data)
    return seen.hexdigest()


def _named(role: str, parameters: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    return [(f"{role}/{name}", p) for name, p in parameters.items()]
