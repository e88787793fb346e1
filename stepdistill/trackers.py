"""Where curves, grids and figures go besides the run's own files: TensorBoard, and Weights & Biases; through accelerate."""

from __future__ import annotations

import netrc
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from . import distributed
from .errors import UserError
from .extras import installed, require
from .files import write_text
from .recipe import dump_recipe, to_tree
from .sections import Recipe
from .show import Line


def chosen(recipe: Recipe) -> tuple[str, ...]:
    """The trackers of a recipe, by name."""
    named = recipe.train.trackers
    return named if named is not None else ("tensorboard",) * installed("tensorboard")


def check_trackers(recipe: Recipe) -> None:
    """Raises UserError if a tracker's package is missing, or if W&B is to be online and has no key: it would ask for one."""
    for name in chosen(recipe):
        require(name, f"train.trackers {name}")
    mode = os.environ.get("WANDB_MODE", "offline")
    if "wandb" in chosen(recipe) and mode not in ("offline", "dryrun", "disabled") and not has_key():
        raise UserError(
            f"train.trackers wandb: WANDB_MODE is {mode}, and there is no key to log in with; run `wandb login`, set "
            f"WANDB_API_KEY, or leave WANDB_MODE unset to log offline"
        )


def has_key() -> bool:
    """Whether W&B finds a key without asking: in the environment, or where `wandb login` puts it, in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    import wandb

    hosts = {urlsplit(wandb.setup().settings.base_url).netloc, "api.wandb.ai"}  # the latter also stands for newer names
    file = Path(os.environ.get("NETRC") or Path.home() / ("_netrc" if os.name == "nt" else ".netrc"))
    try:
        return not hosts.isdisjoint(netrc.netrc(file.expanduser()).hosts)
    except (OSError, netrc.NetrcParseError):
        return False


class Trackers:
    """The trackers of a run that work, on its first process.

    They write into folder/tensorboard and folder/wandb, and go on there when the run does. `at` is the step that it goes on
    from: what TensorBoard was told of later ones is withdrawn.
    """

    def __init__(self, recipe: Recipe, folder: Path, at: int, line: Line):
        self.recipe, self.folder, self.at, self.line = recipe, folder, at, line
        self.working: dict[str, Any] = {}  # name -> accelerate's tracker
        for name in chosen(recipe) if distributed.rank() == 0 else ():
            self.attempt(name, self.start)

    def start(self, name: str) -> None:
        """Make a tracker, and tell it the recipe."""
        from accelerate.tracking import TensorBoardTracker, WandBTracker

        if name == "tensorboard":
            tracker = TensorBoardTracker(name, self.folder, purge_step=self.at + 1)
            tracker.start()
            # as text: store_init_configuration would make another run in the folder at each start
            tracker.log({"recipe": f"```yaml\n{dump_recipe(self.recipe)}```"}, self.at)
        else:
            project = os.environ.get("WANDB_PROJECT", "stepdistill")
            tracker = WandBTracker(project, name=self.recipe.name, **wandb_settings(self.folder))
            tracker.start()
            tracker.store_init_configuration(to_tree(self.recipe))
        self.working[name] = tracker

    def attempt(self, name: str, action: Callable[[str], None]) -> None:
        """Do something with a tracker; if it fails, say so once, and switch it off.

        The only place of a training where any exception is swallowed: a full disk or a lost network is no reason to
        lose a training whose curves are in log.jsonl as well.
        """
        try:
            action(name)
        except Exception as error:
            self.working.pop(name, None)
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            self.line.say(f"warning: tracker {name} failed and is switched off, training goes on ({why})")

    def each(self, action: Callable[[Any], None]) -> None:
        """Do something with every tracker that works."""
        for name in list(self.working):
            self.attempt(name, lambda name: action(self.working[name]))

    def log(self, values: dict[str, float], step: int) -> None:
        """Losses, gradient norms and rates of one step."""
        self.each(lambda tracker: tracker.log(values, step))

    def grid(self, file: Path, step: int) -> None:
        """A picture of samples."""
        if not self.working:
            return
        picture = np.asarray(Image.open(file).convert("RGB"))[None]  # [1, H, W, 3]
        for name in list(self.working):
            form = {"dataformats": "NHWC"} if name == "tensorboard" else {}
            self.attempt(name, lambda name: self.working[name].log_images({"samples": picture}, step, **form))  # noqa: B023

    def figures(self, rows: list[dict[str, Any]], step: int) -> None:
        """The student's figures in the final table, as eval/<steps>steps/<figure>; the teacher's do not change."""
        values = {
            f"eval/{row['steps']}steps/{name}": float(value)
            for row in rows
            for name, value in row.items()
            if row["who"] == "student" and name != "steps" and isinstance(value, int | float)
        }
        if values:
            self.log(values, step)

    def finish(self) -> None:
        """Close them."""
        self.each(lambda tracker: tracker.finish())
        self.working = {}


@contextmanager
def tracking(recipe: Recipe, folder: Path, at: int, line: Line) -> Iterator[Trackers]:
    """The trackers of a run, closed however it ends."""
    trackers = Trackers(recipe, folder, at, line)
    try:
        yield trackers
    finally:
        trackers.finish()


def wandb_settings(folder: Path) -> dict[str, Any]:
    """What `wandb.init` is given: one id for the run and all that resumes it, its files in folder/wandb, no word printed."""
    file = folder / "wandb" / "run-id.txt"
    if not file.is_file():
        file.parent.mkdir(exist_ok=True)
        write_text(file, uuid.uuid4().hex[:8])
    mode = os.environ.get("WANDB_MODE", "offline")
    return {
        "dir": str(folder),
        "id": file.read_text().strip(),
        "mode": mode,
        "resume": None if mode in ("offline", "dryrun") else "allow",  # offline, `wandb sync` joins what has one id
        "settings": {"silent": True, "console": "off"},
    }
