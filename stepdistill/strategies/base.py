"""What a distillation method is: one training iteration that yields losses. Its fields are its YAML keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..batch import Batch, Draw
from ..roles import Roles
from ..sampling import Inference
from ..schedules import Schedule

Loss = tuple[str, Tensor, dict[str, Tensor]]  # player, scalar to minimize, named scalars to log


@dataclass
class Strategy:
    """Hyper-parameters are fields, the maths is in `losses`; `roles`, `needs` and `decodes` may also be properties."""

    roles: ClassVar[tuple[str, ...]] = ("student",)  # made beside the teacher, and equal to it at first
    needs: ClassVar[frozenset[str]] = frozenset()  # fields of Batch, beyond noise, cond and null, that data must fill
    decodes: ClassVar[bool] = False  # whether losses call roles.decode; else the autoencoder leaves the device while training
    stages: ClassVar[int] = 1  # that `stage` tells apart; training must last until the last of them

    def check(self) -> Iterator[str]:
        """Problems with the fields taken together, each a sentence with the rule and the remedy."""
        yield from ()

    def setup(self, roles: Roles) -> None:
        """Make the modules that only this strategy has. Called once, seeded, before there are optimizers."""

    def modules(self) -> dict[str, nn.Module]:
        """Those modules by name: placed on the device, trained by the players that name them, saved."""
        return {}

    def stage(self, step: int) -> int:
        """The stage of training, a pure function of the step; a change brings fresh optimizers."""
        return 0

    def enter(self, roles: Roles, stage: int) -> None:
        """Set values once as a stage begins (not when a run resumes inside it)."""

    def players(self, stage: int) -> dict[str, tuple[str, ...]]:
        """Who trains which roles and modules, by name; asked before setup too."""
        return {"student": ("student",)}

    def losses(self, roles: Roles, batch: Batch, draw: Draw) -> Iterator[Loss]:
        """One iteration on one batch. Each loss is backpropagated as soon as it is yielded, into its player alone; every
        player that got a loss moves when the iteration ends. Never yield inside no_grad."""
        raise NotImplementedError

    def after_step(self, roles: Roles, moved: set[str]) -> None:
        """Bookkeeping after the players in `moved` moved, such as an average."""

    def inference(self, schedule: Schedule, steps: int | None = None) -> Inference:
        """How the student is sampled, in `steps` evaluations (None: as many as it is made for).

        Raises:
            ValueError: this student cannot be sampled in that many.
        """
        raise NotImplementedError
