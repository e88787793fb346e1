"""A run: its folder, when it may go on, and the road from a recipe to an export."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from . import checkpoint, devices, distributed, report
from .account import Account, accounted
from .assemble import Distillation, assemble
from .data import build_batches
from .devices import placed
from .errors import Diverged, UserError
from .evaluate.evaluation import check, evaluate
from .evaluate.grid import Samples
from .export import write_card, write_export
from .inference import recipe_hash, serving
from .machine import check_machine
from .pairs import make_pairs
from .recipe import Recipe, differences, dump_recipe, load_recipe
from .show import Line, Log, summary
from .sidecar import SIDECAR, read_export
from .timing import Times
from .trackers import Trackers, tracking
from .trainer import Trainer

FREE = (  # keys that a run may change when it goes on
    *("train.steps", "train.save_every", "train.skip", "train.trackers"),
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
    def step(self) -> int:
        """Iterations that its newest checkpoint holds."""
        return max(checkpoint.steps(self.checkpoints), default=0)

    def finished(self, recipe: Recipe) -> bool:
        """Whether this recipe was trained to its end, and exported after that."""
        done = self.step >= recipe.train.steps and (self.export / SIDECAR).is_file()
        return done and read_export(self.export).recipe_hash == recipe_hash(recipe)


def train(recipe: Recipe, output: Path | str | None = None, resume: str = "auto") -> Run:
    """Train, show, export, check the export, evaluate, and report. Calling it again goes on where it stopped.

    Args:
        output: the run's folder; None: runs/<name of the recipe>.
        resume: "auto" (go on if the folder holds a run of this recipe), "never" (move the old folder aside) or the path of
            a checkpoint to start from.

    Raises:
        UserError: the folder holds a run of another recipe, or the machine lacks what the recipe asks for.
        Diverged: a loss or gradient is not finite; the state before that step is saved.
        KeyboardInterrupt: SIGINT or SIGTERM came; a checkpoint is saved (before training: encodings and pairs so far).
    """
    run, line = Run(Path(output) if output else Path("runs") / recipe.name), Line()
    check_machine(recipe)
    check(recipe)
    start = find_start(run, recipe, resume, line)
    if start is not None and start == checkpoint.latest(run.checkpoints) and run.finished(recipe):
        line.say(f"{run.folder} is finished ({run.step} steps). Its export: {run.export}")
        return run
    times = Times(distributed.device())
    distillation = assemble(recipe)
    serving(distillation)  # what no stock pipeline can sample is refused before any work
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "recipe.yaml").write_text(dump_recipe(recipe))

    pairs = Path(recipe.pairs.folder or run.folder / "pairs")
    if "pairs" in recipe.strategy.needs and recipe.pairs.folder is None:
        make_pairs(distillation, pairs, line)
    cache = Path(recipe.data.cache or run.folder.parent / "cache")
    trainer = Trainer(distillation, build_batches(recipe, distillation.family, line, pairs, cache), times)
    if start is not None:
        trainer.load(start)
        line.say(f"going on from {start} at step {trainer.at}")
    samples = Samples(distillation, run.folder / "samples", line)
    account = Account(run.folder, times, trainer.at, recipe.train.steps, recipe.train.batch)
    times.lap("preparing")
    with accounted(account, line), tracking(recipe, run.folder, trainer.at, line) as trackers:
        with placed(idle(distillation), devices.IDLE):
            loop(run, trainer, samples, trackers, account, line)

        with times("saving"):
            line.say(f"exported to {run.export}; {write_export(distillation, run.export)}")
        if recipe.eval.n:
            with times("evaluation"):
                trackers.figures(evaluate(distillation, run.folder / "eval", line), trainer.at)
            write_card(run.export, run.folder)
    if distributed.rank() == 0:
        line.say(f"report: {report.write([run.folder])}")
    return run


def idle(distillation: Distillation) -> list[nn.Module]:
    """The parts of the pipeline that training does not need once everything is encoded."""
    family = distillation.family
    return family.encoders + ([] if distillation.strategy.decodes else [family.pipe.vae])


def loop(run: Run, trainer: Trainer, samples: Samples, trackers: Trackers, account: Account, line: Line) -> None:
    """Step until train.steps, with the log, sample grids and checkpoints on the way."""
    recipe = trainer.recipe
    main = distributed.rank() == 0
    log, began, first = Log(run.folder, trainer.at), time.monotonic(), trainer.at
    if recipe.eval.every and trainer.at == 0 and main:
        with trainer.times("evaluation"):
            trackers.grid(samples(0), 0)
    with stopping() as stop:
        while trainer.at < recipe.train.steps:
            stage = trainer.stage
            try:
                values = trainer.step()
            except Diverged as error:
                path = trainer.save(run.checkpoints)
                raise Diverged(error.player, error.tensor, error.step, path) from None
            if trainer.stage != stage and trainer.strategy.stages > 1:
                line.say(f"stage {trainer.stage + 1} of {trainer.strategy.stages}")
            seconds = time.monotonic() - began
            note = {"skipped": "{1} of player {0}".format(*trainer.skipped)} if trainer.skipped else {}
            if note:
                line.say(f"step {trainer.at} is skipped: {note['skipped']} is not finite")
            log(trainer.at, seconds, values, note | account.told(trainer.at))
            trackers.log(values, trainer.at)
            left = seconds / (trainer.at - first) * (recipe.train.steps - trainer.at)
            line(summary(trainer.at, recipe.train.steps, left, values), final=trainer.at == recipe.train.steps)
            done = trainer.at == recipe.train.steps
            if done or stop or trainer.at % recipe.train.save_every == 0:
                with trainer.times("saving"):
                    path = trainer.save(run.checkpoints)
                account.write()
            if stop and not done:
                line.say(f"stopped at step {trainer.at}; saved {path}. The same command goes on from there.")
                raise KeyboardInterrupt
            if recipe.eval.every and main and (done or trainer.at % recipe.eval.every == 0):
                with trainer.times("evaluation"):
                    trackers.grid(samples(trainer.at), trainer.at)
    log.close()


def find_start(run: Run, recipe: Recipe, resume: str, line: Line) -> Path | None:
    """The checkpoint to start from, by the rules of `train`; None: from nothing."""
    if resume not in ("auto", "never"):
        path = Path(resume)
        path = path if (path / "state.json").is_file() else checkpoint.latest(path / "checkpoints")
        if path is None:
            raise UserError(f"--resume {resume}: no checkpoint there; give a run folder or one of its checkpoints/<step>")
        return path
    if not (run.folder / "recipe.yaml").is_file():
        return None
    if resume == "never":
        n = next(n for n in range(1, 10_000) if not run.folder.with_name(f"{run.folder.name}.old-{n}").exists())
        aside = run.folder.with_name(f"{run.folder.name}.old-{n}")
        run.folder.rename(aside)
        line.say(f"moved the old run to {aside}")
        return None
    changed = [key for key in differences(run.recipe, recipe) if not key.startswith(FREE)]
    if changed:
        raise UserError(
            f"{run.folder} holds a run of another recipe; they differ in {', '.join(changed)}. "
            f"Use --output for another folder, or --resume never to move the old one aside."
        )
    return checkpoint.latest(run.checkpoints)


class Stop:
    """True once somebody asked the process to stop."""

    asked = False

    def __bool__(self) -> bool:
        return self.asked


@contextmanager
def stopping() -> Iterator[Stop]:
    """Turn the first SIGINT or SIGTERM into a flag; the second one interrupts at once."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(_signal, _frame):
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
