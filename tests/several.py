"""Tiny distillations in several processes: files are made once, and each process loads them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from processes import world
from students import student

from stepdistill import distributed
from stepdistill.assemble import Distillation, assemble
from stepdistill.data import build_batches
from stepdistill.recipe import load_recipe
from stepdistill.trainer import Trainer

QUICK = (
    *("data.count=12", "data.images=stepdistill/tiny", "train.steps=6", "train.batch=12"),
    *("optim.student_lr=1e-3", "optim.critic_lr=1e-3"),
)
STRATEGIES = {
    "lcm": "{name: lcm, guidance: [1, 3], ema: 0.9}",
    "dmd2": "{name: dmd2, student_every: 2, guidance: 2, gan: 0.01}",
    "f_distill": "{name: f_distill, divergence: jeffreys, student_every: 2, bins: 2, bins_decay: 0.5}",
    "reflow": "{name: reflow, steps: 1}",
    "scm": "{name: scm, guidance: 2}",
    "phased_dmd": "{name: phased_dmd, steps: 2, phase_steps: 2, student_every: 1, guidance: 2}",
    "tscd": "{name: tscd, segments: [2, 1], stage_steps: 2, mix: [0.1, 0.2], grid: 4, guidance: [1, 3], ema: 0.9}",
}


EPSILON = {"LCM": 1e-3}  # of AdamW, else 1e-5; its own, 1e-8, lets it walk by the sign of what is rounding alone


class Damped(Trainer):
    """Its optimizers take small gradients for small: so rounding stays rounding, and gradients of a wrong size show."""

    def open(self, stage: int, enter: bool = True) -> None:
        super().open(stage, enter)
        for group in (group for optimizer in self.optimizers.values() for group in optimizer.param_groups):
            group["eps"] = EPSILON.get(type(self.strategy).__name__, 1e-5)


def prepare(folder: Path, strategy: str, teacher: str = "eps", *overrides: str) -> Path:
    """A recipe, and the pipeline that it names."""
    student(folder, teacher, *QUICK, *overrides, strategy=STRATEGIES[strategy])
    return folder / "run" / "recipe.yaml"


def trainer(recipe: Path, *overrides: str) -> Damped:
    """A trainer in this process, whose students are not their teacher."""
    distillation = assemble(load_recipe(recipe, overrides), shares=True)
    move(distillation)
    return Damped(distillation, build_batches(distillation.recipe, distillation.family))


@torch.no_grad()
def move(distillation: Distillation) -> None:
    """Add noise to all that the student learns, so that a lost adapter shows, and to heads, so that they tell samples apart."""
    generator = torch.Generator().manual_seed(0)
    roles, modules = distillation.roles.items(), distillation.strategy.modules().values()
    for p in (p for who, role in roles if who.startswith("student") for p in role.parameters()):
        distributed.fill(p, distributed.whole(p) + 0.05 * torch.randn(p.shape, generator=generator))
    for p in (p for module in modules for p in module.parameters()):
        p.add_(0.5 * torch.randn(p.shape, generator=generator))


def weights(made: Trainer) -> torch.Tensor:
    """All that is trained, and its averages, in one row; all processes must ask."""
    return torch.cat([distributed.whole(x).detach().float().flatten() for x in made.distillation.tensors().values()])


def walk(out: Path, recipe: Path, steps: int, overrides: tuple[str, ...], start: Path | None = None, machines: int = 1):
    """Train so many steps, from a checkpoint or from nothing, as on so many machines, and save in out/checkpoints.

    Returns the logs, how many tensors are in shares, and the checkpoint; all weights are in out/<rank>.npy.
    """
    os.environ["LOCAL_WORLD_SIZE"] = str(distributed.world() // machines)
    made = trainer(recipe, *overrides)
    if start is not None:
        made.load(start)
    logs = [made.step() for _ in range(steps)]
    out.mkdir(exist_ok=True)
    np.save(out / f"{distributed.rank()}.npy", weights(made).numpy())
    saved = made.save(out / "checkpoints")
    return logs, sum(map(distributed.sharded, made.distillation.tensors().values())), saved


def walked(out: Path, processes: int, *args) -> tuple[list[dict[str, float]], np.ndarray, int, Path]:
    """`walk` in several processes, which end with the same weights to the bit: logs, weights, tensors in shares, checkpoint."""
    told = world(processes, walk, out, *args, seconds=300)
    rows = [np.load(out / f"{rank}.npy") for rank in range(processes)]
    assert all(np.array_equal(row, rows[0]) for row in rows)
    assert all(one == told[0] for one in told)
    logs, shares, saved = told[0]
    return logs, rows[0], shares, saved
