"""A student beside its teacher: measured on a bench, printed as a table, written to RUN/eval/<suite>.json.

Rows of that file that compare are not measured again, nor are those of embedded teachers that ship with the package; but
nearness to the teacher is, where it was to another one, and speed, where it was another machine's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import distributed
from ..assemble import Distillation, restore
from ..data.texts import Texts
from ..errors import UserError
from ..files import set_aside
from ..recipe import Recipe
from ..show import Line
from ..sources import EMBEDDED_DATA
from . import provenance, results, tiny
from .bench import Bench, Row, clear, first, row
from .candidates import student
from .measure import Suite
from .presets import OWN, PRESETS, find_preset, suite, tiny_suite
from .rivals import asked_for, best_known, nearest, of_the_world
from .shipped import shipped
from .table import render

ABOUT = ("who", "steps", "nfe", "guidance", "solver")  # what tells rows of one file apart
AGAINST = ("teacher@25",)  # guided


def evaluate(distillation: Distillation, folder: Path, line: Line) -> list[Row]:
    """The table at the end of training, of the embedded world: measured, printed, and written to folder/tiny.json."""
    recipe = distillation.recipe
    if distillation.together:
        line.say(f"no table: networks are in shares; with whole ones: stepdistill eval {folder.parent}")
        return []
    if recipe.data.prompts != EMBEDDED_DATA:
        line.say(
            f"no table: only the embedded world (data.prompts: {EMBEDDED_DATA}) brings its own prompts and pictures; with "
            f"yours: stepdistill eval {folder.parent} --prompts FILE --reference FOLDER"
        )
        return []
    if distillation.family.frames is not None:
        line.say("no table: figures are of pictures, and this student makes videos")
        return []
    return compare(distillation, tiny_suite(recipe.eval.n, seed=recipe.eval.seed), folder, line)


def check(recipe: Recipe) -> None:
    """Raises UserError where `evaluate` would, at the end of a long training."""
    if recipe.data.prompts == EMBEDDED_DATA and recipe.eval.n:
        tiny_suite(recipe.eval.n)


def evaluate_run(
    run: Path,
    preset: str | None = None,
    prompts: Path | None = None,
    reference: str | None = None,
    n: int | None = None,
    steps: Sequence[int] = (),
    against: Sequence[str] = (),
    features: Sequence[str] = (),
    batch: int | None = None,
) -> list[Row]:
    """`stepdistill eval RUN`: the newest checkpoint of a run, or an export, beside its teacher.

    Args:
        preset: tiny, or one of PRESETS; None: tiny, unless prompts or a reference are given.
        prompts, reference: of a preset, or of the user's own protocol, whose file is named after that of the prompts.
        n, steps, against, features, batch: other than the preset's, the recipe's and the usual teachers.

    Raises:
        UserError: nothing to measure is there, or what is asked for does not fit it.
    """
    line = Line()
    preset = preset or ("tiny" if prompts is None and reference is None else None)
    if preset == "tiny" and (prompts or reference or features):
        raise UserError("the preset tiny has its own prompts, reference and features: leave these out, or --preset")
    chosen = OWN if preset is None else None if preset == "tiny" else find_preset(preset)
    distillation = restore(run)
    recipe, family = distillation.recipe, distillation.family
    if family.frames is not None:
        raise UserError(f"{run} makes videos, and figures are of pictures; look at one: stepdistill sample {run} --prompt TEXT")
    if chosen is None:
        if recipe.data.prompts != EMBEDDED_DATA:
            raise UserError(
                f"{run} was not trained on the embedded world ({EMBEDDED_DATA}), which is measured unless something else is "
                f"asked for; give --prompts FILE and --reference FOLDER, or --preset {' or '.join(PRESETS)}"
            )
        made = tiny_suite(n or recipe.eval.n or tiny.PICTURES, seed=recipe.eval.seed)
    else:
        chosen = replace(chosen, n=n or chosen.n, features=tuple(features) or chosen.features)
        name = preset or f"own-{prompts.stem}" * bool(prompts)  # no file of prompts can pose as a preset
        cache = Path(recipe.data.cache or run.parent / "cache") / "references"
        device = distillation.roles.teacher.net.device
        made = suite(name, chosen, prompts, reference, family.size, recipe.eval.seed, device, cache, line)
    return compare(distillation, made, run / "eval", line, batch, steps, against)


def compare(
    distillation: Distillation,
    suite: Suite,
    folder: Path,
    line: Line,
    batch: int | None = None,
    steps: Sequence[int] = (),
    against: Sequence[str] = (),
) -> list[Row]:
    """Student and teachers through a suite; the rows, in the first process.

    steps: numbers of steps of the student; none: those of its recipe. against: see `asked_for`; none: AGAINST, or of the
    embedded world all of `of_the_world`.
    """
    bench = Bench(distillation, suite, folder, line, batch or distillation.recipe.eval.batch, Texts(distillation.family))
    students = [student(distillation, n) for n in sorted(set(steps or distillation.counts), reverse=True)]
    about = {"compared": suite.compared, "told": provenance.told(distillation)}
    if is_tiny := suite.name == "tiny":
        about["told"]["floor"] = tiny.floor(suite.n)[0]
    path = folder / f"{suite.name}.json"
    written = {row["key"]: row for row in written_before(path, about, line)}
    ships = shipped(distillation.recipe.model.source) if is_tiny and not distillation.recipe.model.loras else None
    best = best_known([*(ships["rows"] if ships else ()), *written.values()])
    known = known_rows(ships, about)

    is_whole = is_tiny and not against
    rivals = list(of_the_world(bench, best) if is_whole else asked_for(bench, against or AGAINST, best))
    teacher = nearest(bench, [candidate for candidate, _ in rivals], best)
    rows: list[Row] = []
    for candidate, more in (*rivals, *((one, {}) for one in students)):
        done = written.get(bench.key(candidate)) or known.get(tuple(candidate.about.values()))
        rows.append(row(bench, candidate, teacher, done) | more)
        if first():  # what was written before stays until all is measured
            mine = {one["key"] for one in rows}
            results.write(path, rows + [one for key, one in written.items() if key not in mine], about)
    distributed.wait()
    if first():
        results.write(path, rows, about)
        clear(bench)
        line.say(render(rows, about))
        line.say(f"written to {path}")
    return rows


def written_before(path: Path, about: Mapping[str, Any], line: Line) -> list[Row]:
    """The rows of a result file; one whose figures do not compare with these is moved aside."""
    if not path.is_file():
        return []
    try:
        old = results.read(path)
    except UserError:
        old = None
    found = old is not None and not results.differences(old["provenance"], about)
    distributed.wait()
    if not found and first():
        other = results.differences(old["provenance"], about) if old else []
        why = "; ".join(f"{name} {a}, now {b}" for name, a, b in other)
        aside = set_aside(path, "old")
        line.say(f"moved figures that do not compare with these to {aside}{why and f' ({why})'}")
    return old["rows"] if found else []


def known_rows(ships: Mapping[str, Any] | None, about: Mapping[str, Any]) -> dict[tuple, Row]:
    """Figures that ship, by the fields of ABOUT, if they compare with these; of no machine, so speed is measured here."""
    if ships is None or results.differences(ships["provenance"], about):
        return {}
    return {tuple(row[name] for name in ABOUT): row for row in ships["rows"]}
