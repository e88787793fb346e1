"""Tiny distillations in several processes: files made once, each process loads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from students import student

from stepdistill import distributed
from stepdistill.assemble import Distillation, assemble
from stepdistill.data import build_batches
from stepdistill.recipe import load_recipe
from stepdistill.trainer import Trainer

QUICK = ("data.count=12", "pairs={count: 12, steps: 2}", "train.steps=6")


def prepare(folder: Path, strategy: str, teacher: str = "eps", *overrides: str) -> Path:
    """A recipe, and the pipeline that it names."""
    student(folder, teacher, "train.batch=12", *QUICK, *overrides, strategy=strategy)
    return folder / "run" / "recipe.yaml"


def trainer(recipe: Path, *overrides: str) -> Trainer:
    """A trainer in this process, whose students are not their teacher."""
    distillation = assemble(load_recipe(recipe, overrides), shares=True)
    move(distillation)
    return Trainer(distillation, build_batches(distillation.recipe, distillation.family))


@torch.no_grad()
def move(distillation: Distillation) -> None:
    """Add noise to all that the student learns, so that a lost adapter shows."""
    generator = torch.Generator().manual_seed(0)
    for p in (p for who, role in distillation.roles.items() if who.startswith("student") for p in role.parameters()):
        distributed.fill(p, distributed.whole(p) + 0.05 * torch.randn(p.shape, generator=generator))


def weights(made: Trainer) -> torch.Tensor:
    """All that is trained, in one row; all processes must ask."""
    return torch.cat([distributed.whole(x).detach().float().flatten() for x in made.distillation.tensors().values()])


def steps(out: Path, recipe: Path, n: int, *overrides: str) -> tuple[list[dict[str, float]], int]:
    """The logs of n steps, and how many tensors were in shares; all weights after them are in out-<rank>.npy."""
    made = trainer(recipe, *overrides)
    logs = [made.step() for _ in range(n)]
    np.save(f"{out}-{distributed.rank()}.npy", weights(made).numpy())
    return logs, sum(map(distributed.sharded, made.distillation.tensors().values()))
