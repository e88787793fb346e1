"""From the first step to the last, with the log, looks at the student, sample grids and checkpoints on the way."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from . import checkpoint, distributed
from .account import Account
from .evaluate.grid import Samples
from .evaluate.watching import Watching
from .memory_advice import memory
from .rescue import rescuing
from .show import Line, Log, read_scores, summary
from .stopping import stopping
from .trackers import Trackers
from .trainer import Trainer


def loop(
    folder: Path,
    trainer: Trainer,
    samples: Samples,
    watching: Watching,
    trackers: Trackers,
    account: Account,
    line: Line,
) -> None:
    """Step until train.steps. folder: of the run.

    Raises:
        KeyboardInterrupt: SIGINT or SIGTERM came; a checkpoint is saved.
        Diverged, UserError: see `rescue`.
    """
    recipe, steps, times = trainer.recipe, trainer.recipe.train.steps, trainer.times
    main = distributed.rank() == 0
    draws = main or trainer.distillation.together  # who runs networks in shares runs them with all
    log, began, first = Log(folder, trainer.at, line) if main else None, time.monotonic(), trainer.at
    if recipe.eval.every and trainer.at == 0 and draws:
        show(samples, trackers, trainer, line)
    with stopping() as stop:
        while trainer.at < steps:
            stage = trainer.stage
            with rescuing(trainer, folder / "checkpoints", line):
                values = trainer.step()
            if trainer.stage != stage and trainer.strategy.stages > 1:
                line.say(f"stage {trainer.stage + 1} of {trainer.strategy.stages}")
            note = {"skipped": "{1} of player {0}".format(*trainer.skipped)} if trainer.skipped else {}
            if note:
                line.say(f"step {trainer.at} is skipped: {note['skipped']} is not finite")
            done = trainer.at == steps
            due = recipe.eval.every and draws and (done or trainer.at % recipe.eval.every == 0)
            watched = {}
            if due:  # before the step is saved: a run that goes on from here has shown it
                with times("evaluation"), memory("sampling", recipe):
                    watched = watching(trainer.at)
                show(samples, trackers, trainer, line)
            seconds = time.monotonic() - began
            spent = account.told(trainer.at)
            if main:
                log(trainer.at, seconds, values | watched, note | spent)
            trackers.log(values | watched, trainer.at)
            left = seconds / (trainer.at - first) * (steps - trainer.at)
            line(summary(trainer.at, steps, left, values), final=done)
            stopped = distributed.anyone(bool(stop))
            if done or stopped or trainer.at % recipe.train.save_every == 0:
                with times("saving"):
                    path = trainer.save(folder / "checkpoints", watched.get("watch/score"))
                account.write()
            if stopped and not done:
                line.say(f"stopped at step {trainer.at}; saved {path}. The same command goes on from there.")
                raise KeyboardInterrupt
    if main:
        log.close()
        for better in best(folder, trainer.at):
            line.say(better)


def show(samples: Samples, trackers: Trackers, trainer: Trainer, line: Line) -> None:
    """A grid of samples; a disk that does not take it is told of, and no reason to lose a training."""
    with trainer.times("evaluation"), memory("sampling", trainer.recipe):
        try:
            trackers.grid(samples(trainer.at), trainer.at)
        except OSError as error:
            line.say(f"warning: no samples of step {trainer.at} could be written ({error}); training goes on")


def best(folder: Path, last: int) -> Iterator[str]:
    """Which checkpoint of a run looks most like the teacher, if that is not the last one, and how to export it."""
    scores = {step: score for step, score in read_scores(folder).items() if step in checkpoint.steps(folder / "checkpoints")}
    if last not in scores or (step := min(scores, key=scores.__getitem__)) == last:
        return
    yield (
        f"step {step} looks more like the teacher (watch/score {scores[step]:.3g}, at the end {scores[last]:.3g}): "
        f"stepdistill export {folder} --checkpoint {step}"
    )
