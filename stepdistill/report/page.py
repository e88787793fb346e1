"""The report of one run, or of several beside each other: one HTML file that needs nothing else, and asks for nothing."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..card import snippet
from ..errors import UserError
from ..evaluate.results import compare
from ..files import write_text
from ..recipe import strategy_name
from . import figures, pictures, plots, settings
from .curves import drawn, health
from .read import Told, names, read

PAGE = Path(__file__).with_name("page.html")
CURVES = ("student", "critic")  # players in this order; others after them
Shown = dict[str, Any]  # what the page is filled with


def write(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the report of these run folders; returns its path.

    out: None: report.html in the run's folder; of several runs in the folder that they share, or else where the command runs.

    Raises:
        UserError: a folder is no run, one is given twice, figures of two do not compare, or `out` cannot be written.
    """
    places = [Path(os.path.realpath(folder)) for folder in folders]
    for folder, place in zip(folders, places, strict=True):
        if places.count(place) > 1:
            raise UserError(f"{folder} is given twice; name each run once")
    if out is None:
        homes = {place.parent for place in places}
        shared = folders[0] if len(folders) == 1 else folders[0].parent if len(homes) == 1 else Path()
        out = shared / "report.html"
    elif out.is_dir():
        out = out / "report.html"
    elif out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {out} must end in .html, or be a folder")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: {out.parent} is no folder; make it first: mkdir -p {out.parent}")
    runs = [read(folder, name) for folder, name in zip(folders, names(folders), strict=True)]
    refuse_unlike(runs)
    text = render(runs)
    write_text(out, text)
    return out


def refuse_unlike(runs: Sequence[Told]) -> None:
    """Raises UserError, naming the fields, if two runs were measured by the same preset but not alike."""
    for preset in dict.fromkeys(preset for run in runs for preset in run.results):
        measured = [run for run in runs if preset in run.results]
        for other in measured[1:]:
            there = (run.results[preset]["provenance"] for run in (measured[0], other))
            compare(*there, (str(measured[0].folder), str(other.folder)))


def render(runs: Sequence[Told]) -> str:
    """The page of runs whose figures compare."""
    import jinja2

    several = len(runs) > 1
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    colours = {run.name: f"run{k % 6 + 1}" if several else "student" for k, run in enumerate(runs)}
    return page.from_string(PAGE.read_text(encoding="utf-8")).render(
        title=" · ".join(run.name for run in runs),
        several=several,
        colours=colours,
        tables=list(tables(runs, colours)),
        gallery=(beside if several else alone)(runs),
        runs=[shown(run, k) for k, run in enumerate(runs)],
        version=__version__,
        date=datetime.date.today().isoformat(),
    )


def tables(runs: Sequence[Told], colours: dict[str, str]) -> Iterator[Shown]:
    """For each preset: the table of all runs' rows, and a plot of quality against evaluations."""
    import markupsafe

    for preset in dict.fromkeys(preset for run in runs for preset in run.results):
        rows = [figures.of(run, row) for run in runs if preset in run.results for row in run.results[preset]["rows"]]
        what = figures.quality(rows)
        lines = series(rows, what, colours) if what else []
        floor = min((row["floor"] for row in rows if what and what.key == "fd" and row.get("floor")), default=None)
        near = floor is not None and floor > 0.2 * min(point[1] for line in lines for point in line.points)
        yield {
            "preset": preset,
            "columns": figures.columns(rows),
            "lines": figures.table(rows),
            "n": next((row["n"] for row in rows if row.get("n")), None),
            "plot": markupsafe.Markup(plots.quality(preset, what.head, lines, floor if near else None)) if lines else None,
            "what": what,
            "series": lines,
            "floor": floor,
            "near": near,  # whether the floor is drawn
            "apart": figures.apart(rows),
        }


def series(rows: Sequence[figures.Row], what: figures.Column, colours: dict[str, str]) -> list[plots.Series]:
    """A line for each run's student, and for each kind of teacher; what several runs have in common is drawn once.

    Of several teachers each line has its name, and the colour of the first run that has it.
    """
    made: dict[tuple[str, str], plots.Series] = {}
    several = figures.several_teachers(rows)
    for row in rows:
        if not row.get("nfe") or row.get(what.key) is None:
            continue
        who = "student" if row["who"] == "student" else "teacher" if (row.get("guidance") or 1) != 1 else "unguided"
        if who == "student":
            name, colour = row["run"] if len(colours) > 1 else "student", colours[row["run"]]
        else:
            name = row["who"] + ", unguided" * (who == "unguided") + (f" of {row['of']}, dashed" if several else "")
            colour = colours[row["run"]] if several else who
        point = (row["nfe"], what.factor * row[what.key], *(row.get(key) for key in what.span or ("", "")))
        one = made.setdefault((name, who), plots.Series(name, colour, [], who))
        if point not in one.points:
            one.points.append(point)
    return sorted(made.values(), key=lambda one: one.who != "student")


def alone(runs: Sequence[Told]) -> Shown | None:
    """Teacher and student of one run side by side, prompt by prompt."""
    (run,) = runs
    if run.gallery is None:
        return None
    strips = pictures.side_by_side(run.gallery)
    return cards(run.gallery.prompts, [(strip.title, strip.who == "student", strip.files) for strip in strips])


def beside(runs: Sequence[Told]) -> Shown | None:
    """The teachers, and each run's student at its own number of steps, for the prompts that all runs drew."""
    drew = [run for run in runs if run.gallery]
    if not drew:
        return None
    first = drew[0].gallery.prompts
    common = [prompt for prompt in dict.fromkeys(first) if all(prompt in run.gallery.prompts for run in drew)]
    teachers, strips = {run.teacher: run for run in reversed(drew) if run.gallery.find("teacher")}, []
    several = len({run.teacher for run in drew}) > 1
    for name, run in reversed(teachers.items()):
        strip = run.gallery.find("teacher")
        strips.append((strip.title + f" of {name}" * several, False, _of(run, strip, common)))
    for run in drew:
        wanted = run.serving and run.gallery.find("student", run.serving.steps)
        if strip := wanted or run.gallery.find("student"):
            strips.append((f"{run.name}, {strip.title.partition(', ')[2]}", True, _of(run, strip, common)))
    alike = all(pictures.alike(run.gallery, drew[0].gallery) for run in drew)
    return cards(common, strips) | {"same": alike and not several}


def _of(run: Told, strip: pictures.Strip, prompts: Sequence[str]) -> list[Path | None]:
    """The pictures of these prompts in a strip of a run."""
    return [strip.files[run.gallery.prompts.index(prompt)] for prompt in prompts]


def cards(prompts: Sequence[str], strips: Sequence[tuple[str, bool, list[Path | None]]]) -> Shown:
    """A card a prompt. strips: (title, whether it is a student's, files in the order of the prompts)."""
    return {
        "cards": [
            {
                "prompt": prompt,
                "pictures": [{"title": t, "student": s, "image": pictures.embed(files[k])} for t, s, files in strips],
            }
            for k, prompt in enumerate(prompts[: pictures.PROMPTS])
        ],
        "of": len(prompts),
        "same": True,  # whether all start from the same noise
    }


def shown(run: Told, k: int) -> Shown:
    """What is told of one run."""
    recipe, told = run.recipe, run.serving
    kind = type(recipe.strategy) if recipe else None
    rows = [figures.of(run, row) for result in list(run.results.values())[:1] for row in result["rows"]]
    return {
        "anchor": f"run-{k + 1}",
        "name": run.name,
        "about": about(run),
        "missing": run.missing,
        "tiles": figures.tiles(rows, told and told.steps),
        "film": film(run),
        "grid": pictures.embed(run.grid, 1200),
        **training(run, kind),
        "spent": spent(run),
        "yaml": run.yaml,
        "few": settings.few_lines(told, run.folder) if told else None,
        "whole": snippet(told) if told else None,
        "facts": settings.facts(told) if told else {},
        "samplers": settings.samplers(told) if told else [],
        "provenance": {preset: settings.leaves(result["provenance"]) for preset, result in run.results.items()},
        "versions": (told.versions | {"recipe": told.recipe_hash}) if told else {},
    }


def about(run: Told) -> str:
    """A run in a sentence."""
    recipe = run.recipe
    if recipe is None:
        return f"{run.steps} steps of training"
    how = f"a LoRA of rank {recipe.lora.rank}" if recipe.lora else "a full copy"
    took = f", in {duration(run.seconds)}" if run.seconds else ""
    return (
        f"{recipe.model.source} distilled by {strategy_name(recipe.strategy)} into {how}: "
        f"{run.steps:,} steps of {recipe.train.batch} samples{took}"
    )


def spent(run: Told) -> dict[str, str]:
    """Where the time of all starts went: "31 min, 47 %"; what is under a thousandth is left out."""
    total = sum(run.spent.values())
    return {name: f"{duration(x)}, {x / total:.1%}" for name, x in run.spent.items() if x >= 0.001 * total > 0}


def duration(seconds: float) -> str:
    """3725 -> "1 h 2 min"."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def training(run: Told, kind: type | None) -> Shown:
    """The curves of each player, and what their strategy says of them."""
    import markupsafe

    order = {"lr": 2, "grad_norm": 1}
    players = sorted(
        dict.fromkeys(name.partition("/")[0] for name in run.curves), key=lambda p: (p not in CURVES, p != CURVES[0])
    )
    said, recipe = health(kind, list(run.curves)), run.recipe
    ends = list(range(1, run.steps)) if recipe and recipe.strategy.stages > 1 else []
    stages = [step for step in ends if recipe.strategy.stage(step) != recipe.strategy.stage(step - 1)]
    curves = []
    for player in players:
        mine = [name for name in run.curves if name.partition("/")[0] == player]
        for name in sorted(mine, key=lambda name: order.get(name.rpartition("/")[2], 0)):
            line = drawn(*run.curves[name])
            if len(line.steps):
                svg = plots.curve(f"{run.name} {name}", name, line, stages, "student" if player == CURVES[0] else "other")
                curves.append({"name": name, "player": player, "svg": markupsafe.Markup(svg), "healthy": said.lines[name]})
    return {"curves": curves, "seen": said.seen, "sick": said.sick, "stages": stages}


def film(run: Told) -> Shown | None:
    """The student's pictures as training went on, beside the teacher's: a card a prompt, a picture in it a step."""
    if run.film is None:
        return None
    steps = pictures.evenly(sorted(run.film.frames), pictures.FRAMES)
    counts = [strip.steps for strip in run.film.frames[steps[-1]].strips if strip.who == "student"]
    if not counts:
        return None
    count = run.serving.steps if run.serving and run.serving.steps in counts else max(counts)
    strips = [run.film.frames[step].find("student", count) for step in steps]
    teacher = run.film.teacher and run.film.teacher.find("teacher")
    prompts = run.film.gallery.prompts[: pictures.PROMPTS]
    return {
        "steps": steps,
        "count": count,
        "teacher": teacher and teacher.title,
        "cards": [
            {
                "prompt": prompt,
                "teacher": pictures.embed(teacher.files[k], pictures.FRAME) if teacher else None,
                "frames": [pictures.embed(strip.files[k], pictures.FRAME) if strip else None for strip in strips],
            }
            for k, prompt in enumerate(prompts)
        ],
    }
