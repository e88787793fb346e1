"""Reads a run folder as plain data: whatever is in it, and in words what is not, with the command that makes it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from .. import account
from ..card import newest_grid
from ..errors import UserError
from ..evaluate import results
from ..foreign import parse_json
from ..recipe import Recipe, load_recipe
from ..sidecar import SIDECAR, Serving, read_export
from ..sources import EMBEDDED_DATA
from .figures import COLUMNS
from .pictures import Film, Gallery, read_film, read_gallery

NUMBERS = {"steps", "nfe", "n", "guidance", "floor"} | {key for c in COLUMNS for key in (c.key, *(c.span or ()))}
Curve = tuple[list[int], list[float]]  # steps, values


@dataclass(frozen=True)
class Told:
    """What a run folder tells. `missing`: sentences, each with the command that mends it."""

    name: str
    folder: Path
    yaml: str  # the resolved recipe
    recipe: Recipe | None  # None: it cannot be read here
    curves: dict[str, Curve]  # "player/what" -> its values; empty before the first step
    seconds: float  # spent in training
    spent: dict[str, float]  # seconds of all its starts, by what they went to; empty where that is not known
    results: dict[str, Mapping[str, Any]]  # preset -> {"rows", "provenance"}
    gallery: Gallery | None  # the newest pictures of teacher and student at the same noise
    film: Film | None  # the student's pictures as training went on
    grid: Path | None  # the newest grid, where single pictures were not kept
    serving: Serving | None  # None: nothing is exported
    missing: list[str] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Iterations that the log knows of."""
        return max((steps[-1] for steps, _ in self.curves.values()), default=0)

    @property
    def teacher(self) -> str:
        """From whom the student was distilled, in words that are equal of equal teachers."""
        if self.recipe is None:
            return self.serving.model if self.serving else f"the teacher of {self.name}"
        model = self.recipe.model
        of = model.source + f"@{model.revision}" * bool(model.revision)
        return ", ".join([of, *filter(None, (model.variant, model.quantize)), *model.loras])


def read(folder: Path, name: str) -> Told:
    """All of a run.

    Raises:
        UserError: the folder is no run.
    """
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder} is no run folder: it has no recipe.yaml; give runs/<name>")
    missing: list[str] = []
    again = f"stepdistill train {shlex.quote(str(folder / 'recipe.yaml'))} --output {shlex.quote(str(folder))}"
    recipe = _unless(missing, lambda: load_recipe(folder / "recipe.yaml", data=False, there=False))
    curves, seconds = read_log(folder / "log.jsonl")
    done = max((steps[-1] for steps, _ in curves.values()), default=0)
    if recipe and done < recipe.train.steps:
        missing.append(f"Trained {done} of {recipe.train.steps} steps; this command goes on: {again}")

    film = read_film(folder / "samples" / "pictures")
    gallery = read_gallery(folder / "eval" / "pictures") or (film and film.gallery)
    grid = None if gallery else newest_grid(folder / "samples")
    if gallery is None and grid is None:
        goes_on = recipe and done < recipe.train.steps
        remedy = f"for pictures every 100 steps from here on: {again} eval.every=100" if goes_on else looking(folder, recipe)
        missing.append(f"No pictures were drawn while it trained; {remedy}")
    if film and film.left_out:
        steps = ", ".join(map(str, film.left_out))
        missing.append(
            f"Pictures of other prompts, or of another eval.seed, than the last ones are left out: those at {steps}."
        )

    files = sorted((folder / "eval").glob("*.json"))
    read_now = {file.stem: made for file in files if (made := _unless(missing, partial(read_figures, file))) and made["rows"]}
    if not read_now:
        missing.append(f"Not measured; {looking(folder, recipe)}")
    serving = None
    if (folder / "export" / SIDECAR).is_file():
        serving = _unless(missing, lambda: read_export(folder / "export"))
    elif done:
        missing.append(f"Not exported; from its newest checkpoint: stepdistill export {shlex.quote(str(folder))}")
    spent = account.read(folder / account.FILE).get("spent", {})
    text = (folder / "recipe.yaml").read_text(encoding="utf-8")
    return Told(name, folder, text, recipe, curves, seconds, spent, read_now, gallery, film, grid, serving, missing)


def names(folders: Sequence[Path]) -> list[str]:
    """A name for each run: its folder's, or, where two have the same, the path as it was given."""
    short = [folder.resolve().name for folder in folders]
    return [name if short.count(name) == 1 else str(folder) for name, folder in zip(short, folders, strict=True)]


def read_log(path: Path) -> tuple[dict[str, Curve], float]:
    """The curves of log.jsonl, and the seconds that all parts of a run took that was stopped and resumed.

    A line that a crash cut short, or that is none of ours, is left out.
    """
    curves: dict[str, Curve] = {}
    total = last = 0.0
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            values = parse_json(line)
            step, seconds = values.pop("step"), values.pop("seconds")
        except (ValueError, KeyError, AttributeError, TypeError):
            continue
        # the rest is where the time went, why an iteration was skipped, and other things that are no curve
        values = {name: value for name, value in values.items() if "/" in name}
        if not isinstance(step, int) or not all(_is_number(x) for x in (seconds, *values.values())):
            continue
        total += seconds - last if seconds >= last else seconds  # the clock of a resumed run begins again
        last = seconds
        for name, value in values.items():
            steps, points = curves.setdefault(name, ([], []))
            steps.append(step), points.append(value)
    return curves, total


def read_figures(path: Path) -> Mapping[str, Any]:
    """A result file whose rows can be shown.

    Raises:
        UserError: it is none.
    """
    made = results.read(path)
    if not all(map(_is_row, made["rows"])):
        raise results.unreadable(path)
    return made


def looking(folder: Path, recipe: Recipe | None) -> str:
    """What draws pictures of a trained student and measures them."""
    place, own = shlex.quote(str(folder)), recipe is not None and recipe.data.prompts != EMBEDDED_DATA
    if recipe is not None and recipe.data.frames is not None:
        return f"videos are not measured; this command draws one: stepdistill sample {place} --prompt TEXT"
    return f"this command does it: stepdistill eval {place}" + " --prompts FILE" * own


def _is_row(row: Any) -> bool:
    """Whether a row of figures can be shown: who it is of, and numbers where numbers belong."""
    return isinstance(row, Mapping) and all(
        isinstance(value, str) if name in ("who", "solver") else value is None or _is_number(value) or name not in NUMBERS
        for name, value in {"who": None, **row}.items()
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _unless(missing: list[str], make) -> Any:
    """What make() returns; a UserError of it is told in `missing`."""
    try:
        return make()
    except UserError as error:
        missing.append(str(error))
        return None
