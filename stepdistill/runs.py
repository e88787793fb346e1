"""A run: its folder, when it may go on, and the road from a recipe to an export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from . import checkpoint, devices, distributed, files, report
from .account import Account, accounted
from .assemble import Distillation, assemble
from .data import build_batches
from .devices import placed
from .errors import UserError
from .evaluate.evaluation import check, evaluate
from .evaluate.grid import Samples, forget
from .evaluate.watching import Watching
from .export import write_card, write_export
from .inference import recipe_hash, serving
from .lock import LOCK, held
from .loop import loop
from .machine import check_machine
from .memory_advice import memory
from .pairs import make_pairs
from .recipe import Recipe, differences, dump_recipe, load_recipe
from .show import Line
from .sidecar import SIDECAR, read_export
from .stopping import interruptible
from .timing import Times
from .trackers import tracking
from .trainer import Trainer, checkpoint_bytes

FREE = (  # keys that a run may change when it goes on
    *("train.steps", "train.save_every", "train.skip", "train.explosion", "train.trackers"),
    *("train.shard", "train.checkpointing", "train.accumulate"),
    *("data.cache", "eval"),
)


@dataclass(frozen=True)
class Run:
    """The folder of a run, and what is in it."""

    folder: Path

    @property
    def recipe(self) -> Recipe:
        return load_recipe(self.folder / "recipe.yaml", data=False)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def export(self) -> Path:
        return self.folder / "export"

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    @property
    def step(self) -> int:
        """Iterations that its newest whole checkpoint holds."""
        newest = checkpoint.newest(self.checkpoints, Line().say)
        return 0 if newest is None else checkpoint.step_of(newest)

    def reported(self, recipe: Recipe) -> bool:
        """Whether this recipe was exported here, and after that measured and reported."""
        done = (self.export / SIDECAR).is_file() and self.report.is_file()
        return done and read_export(self.export).recipe_hash == recipe_hash(recipe)

    def finished(self, recipe: Recipe) -> bool:
        """Whether this recipe was trained to its end, and exported, measured and reported after that."""
        return self.reported(recipe) and self.step >= recipe.train.steps


def train(recipe: Recipe, output: Path | str | None = None, resume: str = "auto") -> Run:
    """Train, show, export, check the export, evaluate, and report. Calling it again goes on where it stopped.

    Args:
        output: the run's folder; None: runs/<name of the recipe>.
        resume: "auto" (go on if the folder holds a run of this recipe), "never" (move the old folder aside) or the path of
            a checkpoint to start from.

    Raises:
        UserError: the folder holds a run of another recipe, is being trained in or cannot be written, the machine lacks what
            the recipe asks for, memory ran out, or data has vanished.
        Diverged: a loss or gradient is not finite once too often, the state before that step is saved; or losses exploded.
        KeyboardInterrupt: SIGINT or SIGTERM came; a checkpoint is saved (before and after training: what is whole stays).
    """
    run, line = Run(Path(output) if output else Path("runs") / recipe.name), Line()
    check_machine(recipe)
    check(recipe)
    if distributed.at_first(lambda: resume != "never" and nothing_left(run, recipe, resume, line)):
        line.say(f"{run.folder} is finished ({recipe.train.steps} steps). Its export: {run.export}")
        return run
    with interruptible():
        if resume == "never" and distributed.told((run.folder / "recipe.yaml").is_file()):
            move_aside(run, line)
        with held(run.folder):
            train_alone(run, recipe, resume, line)
    return run


def train_alone(run: Run, recipe: Recipe, resume: str, line: Line) -> None:
    """`train`, where nobody else trains in the run's folder."""

    def begin() -> Path | None:
        checkpoint.tidy(run.checkpoints)
        return None if resume == "never" else find_start(run, recipe, resume, line)

    times = Times(distributed.device())
    start = distributed.at_first(begin)
    distillation = assemble(recipe, shares=True)
    serving(distillation)  # what no stock pipeline can sample is refused before any work
    distributed.at_first(lambda: prepare(run, recipe, start, checkpoint_bytes(distillation), line))

    pairs = Path(recipe.pairs.folder or run.folder / "pairs")
    if "pairs" in recipe.strategy.needs and recipe.pairs.folder is None:
        with memory("making pairs", recipe):
            make_pairs(distillation, pairs, line)
    cache = Path(recipe.data.cache or run.folder.parent / "cache")
    with memory("encoding", recipe):
        trainer = Trainer(distillation, build_batches(recipe, distillation.family, line, pairs, cache), times)
    if start is not None:
        trainer.load(start)
        line.say(f"going on from {start} at step {trainer.at}")
    with memory("encoding", recipe):
        samples, watching = Samples(distillation, run.folder / "samples", line), Watching(distillation, line)
    account = Account(run.folder, times, trainer.at, recipe.train.steps, recipe.train.batch)
    times.lap("preparing")
    with accounted(account, line), tracking(recipe, run.folder, trainer.at, line) as trackers:
        with placed(idle(distillation), devices.IDLE):
            loop(run.folder, trainer, samples, watching, trackers, account, line)

        if distributed.rank() == 0:
            run.report.unlink(missing_ok=True)  # its being there says that all that follows is done
        with times("saving"):
            line.say(f"exported to {run.export}; {write_export(distillation, run.export)}")
        if recipe.eval.n:
            with times("evaluation"), memory("evaluation", recipe):
                trackers.figures(evaluate(distillation, run.folder / "eval", line), trainer.at)
            if distributed.rank() == 0:
                write_card(run.export, run.folder)
    if distributed.rank() == 0:
        line.say(f"report: {report.write([run.folder])}")


def idle(distillation: Distillation) -> list[nn.Module]:
    """The parts of the pipeline that training does not need once everything is encoded."""
    family = distillation.family
    return family.encoders + ([] if distillation.strategy.decodes else [family.pipe.vae])


def nothing_left(run: Run, recipe: Recipe, resume: str, line: Line) -> bool:
    """Whether the run is finished, and is what is to be gone on from."""
    start = find_start(run, recipe, resume, line) if run.reported(recipe) else None
    return start is not None and start.parent == run.checkpoints and checkpoint.step_of(start) >= recipe.train.steps


def move_aside(run: Run, line: Line) -> None:
    """Rename the folder of an old run, in which nobody may train."""
    with held(run.folder):
        if distributed.rank() == 0:
            aside = files.set_aside(run.folder, "old")
            (aside / LOCK).unlink()
            line.say(f"moved the old run to {aside}")


def find_start(run: Run, recipe: Recipe, resume: str, line: Line) -> Path | None:
    """The checkpoint to start from, by the rules of `train`, whole to the last byte; None: from nothing."""
    if resume != "auto":
        path = Path(resume)
        path = checkpoint.check(path) if checkpoint.is_one(path) else checkpoint.newest(path / "checkpoints", line.say)
        if path is None:
            raise UserError(f"--resume {resume}: no checkpoint there; give a run folder or one of its checkpoints/<step>")
        return path
    if not (run.folder / "recipe.yaml").is_file():
        return None
    changed = [key for key in differences(run.recipe, recipe) if not key.startswith(FREE)]
    if changed:
        raise UserError(
            f"{run.folder} holds a run of another recipe; they differ in {', '.join(changed)}. "
            f"Use --output for another folder, or --resume never to move the old one aside."
        )
    return checkpoint.newest(run.checkpoints, line.say)


def prepare(run: Run, recipe: Recipe, start: Path | None, needed: int, line: Line) -> None:
    """Make the folder ready for training from `start`, whose checkpoints take about `needed` bytes: what is of later steps,
    unfinished or damaged goes out of the way.

    Raises:
        UserError: no checkpoint fits on the disk.
    """
    checkpoint.check_space(run.checkpoints, needed, recipe.train.keep, line.say)
    files.sweep(run.folder)
    files.recover(run.export)
    for path in checkpoint.set_aside(run.checkpoints, start):
        line.say(f"set aside what this training does not go on from: {path}")
    forget(run.folder / "samples", 0 if start is None else checkpoint.step_of(start))
    files.write_text(run.folder / "recipe.yaml", dump_recipe(recipe))
