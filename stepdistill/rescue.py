"""What becomes of a training whose step fails: the state before it is saved, as far as it is whole, and told in the error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import checkpoint, distributed
from .errors import Diverged, Exploded, UserError
from .memory_advice import memory
from .show import Line
from .trainer import Trainer
from .watch import RECENT


@contextmanager
def rescuing(trainer: Trainer, folder: Path, line: Line) -> Iterator[None]:
    """Around `trainer.step`; folder: of the checkpoints.

    Raises:
        Diverged: as it does, with the checkpoint of the state before, which is saved.
        Exploded: as it does, with the checkpoints from before; none is saved of what comes after.
        UserError: memory ran out, or data has vanished; the state before is saved, if nobody has moved yet.
    """
    try:
        with memory("training", trainer.recipe):
            yield
    except Exploded as error:
        paths = [folder / f"{step:06d}" for step in checkpoint.steps(folder) if step <= error.step - RECENT]
        raise Exploded(error.player, error.usual, error.size, error.step, paths) from None
    except Diverged as error:
        raise Diverged(error.player, error.tensor, error.step, kept(trainer, folder, line)) from None
    except UserError as error:
        raise UserError(f"{error}. {saved(trainer, folder)}") from None


def kept(trainer: Trainer, folder: Path, line: Line) -> Path | None:
    """The last good state of a training that diverged: saved now or, where the disk does not take it, which is told, before."""
    try:
        return trainer.save(folder)
    except UserError as error:
        line.say(str(error))
        return checkpoint.newest(folder)


def saved(trainer: Trainer, folder: Path) -> str:
    """Save what can be saved by this process alone, and say so; the others, if there are any, wait for it elsewhere."""
    if trainer.intact and distributed.world() == 1:
        return f"The state of step {trainer.at} is saved: {trainer.save(folder)}"
    newest = checkpoint.newest(folder)
    return f"The last checkpoint is {newest}" if newest else "No checkpoint had been saved"
