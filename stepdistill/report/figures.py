"""The table of figures: which columns there are, what each means, and how its numbers are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from .read import Told

Row = Mapping[str, Any]  # of a result file; "run", the name of the run it is of, and "of", of the run's teacher


class Column(NamedTuple):
    key: str  # in a row
    head: str
    form: str  # of format()
    better: str  # "lower", "higher", or "" where neither is
    meaning: str
    span: tuple[str, str] | None = None  # keys of its interval
    factor: float = 1.0  # what is written is so many times the value
    unit: str = ""


COLUMNS = (  # those that answer most questions first
    Column("nfe", "evaluations", ".0f", "", "network calls a picture; guidance counts twice"),
    Column("fd", "FD", ".2f", "lower", "Fréchet distance to the reference, with its 95 % interval", ("fd_low", "fd_high")),
    Column("patch_fd", "patch FD", ".2f", "lower", "Fréchet distance of crops at full resolution"),
    Column("cmmd", "CMMD", ".3f", "lower", "kernel distance of CLIP features"),
    Column(
        "alignment", "alignment", ".1f", "higher", "share of what captions state that a judge reads in pictures", None, 100, "%"
    ),
    Column("clip", "CLIP score", ".3f", "higher", "cosine of picture and prompt"),
    Column("recall", "recall", ".3f", "higher", "share of the reference that lies among the pictures"),
    Column("diversity", "diversity", ".2f", "higher", "spread of pictures of one caption; of the judge's, 1 is the drawings'"),
    Column("saturation_relative", "saturation", ".2f", "", "relative to the reference's; 1 is the same"),
    Column(
        "fidelity",
        "fidelity",
        ".3f",
        "lower",
        "distance to the teacher's picture at the same noise, root mean square in [0, 1]",
    ),
    Column(
        "ms", "time", ".1f", "lower", "of one picture, with its quartiles where they are known", ("ms_low", "ms_high"), 1, "ms"
    ),
    Column("hps", "HPSv2", ".3f", "higher", "what people are expected to prefer"),
    Column("image_reward", "ImageReward", ".3f", "higher", "what people are expected to prefer"),
    Column("kid", "KID", ".4g", "lower", "kernel distance to the reference, which does not grow as pictures are fewer"),
    Column("precision", "precision", ".3f", "higher", "share of pictures that lie among the reference's"),
    Column("density", "density", ".3f", "higher", "how densely the reference lies around pictures"),
    Column("coverage", "coverage", ".3f", "higher", "share of the reference with a picture nearby"),
    Column("variety", "variety", ".3f", "higher", "1 - SSIM of two pictures of one prompt"),
    Column("variety_lpips", "variety, LPIPS", ".3f", "higher", "perceptual distance of two pictures of one prompt"),
    Column("vendi", "Vendi", ".2f", "higher", "effective number of different pictures"),
    Column("fidelity_dssim", "1 - SSIM", ".3f", "lower", "structural distance to the teacher's picture at the same noise"),
    Column("fidelity_lpips", "LPIPS", ".3f", "lower", "perceptual distance to the teacher's picture at the same noise"),
    Column("saturation", "saturation", ".3f", "", "mean of the pictures' colours; compare it with the teacher's"),
    Column("contrast", "contrast", ".3f", "", "mean spread of brightness; compare it with the teacher's"),
    Column("contrast_relative", "contrast", ".2f", "", "relative to the reference's; 1 is the same"),
    Column("memory_mib", "memory", ",.0f", "lower", "most that was held at once", None, 1, "MiB"),
)
QUALITY = ("fd", "patch_fd", "cmmd", "kid", "clip", "alignment")  # what is plotted: the first that there is
TILES = ("nfe", "fd", "alignment", "clip", "ms")  # of the head of the page


class Cell(NamedTuple):
    value: str  # empty where there is none
    span: str = ""  # its interval
    best: bool = False  # of all students' in the column


class Line(NamedTuple):
    """A row as it is shown."""

    run: str
    who: str
    steps: str
    how: str  # guidance and solver; empty of a student
    student: bool
    cells: list[Cell]


class Tile(NamedTuple):
    """A figure of the student, and of the teacher at its best."""

    head: str
    value: str
    teacher: str


def of(run: Told, row: Mapping[str, Any]) -> Row:
    """A row of a result file of a run."""
    return {**row, "run": run.name, "of": run.teacher}


def several_teachers(rows: Sequence[Row]) -> bool:
    return len({row.get("of") for row in rows}) > 1


def apart(rows: Sequence[Row]) -> list[str]:
    """To whose pictures `fidelity` is a distance."""
    several = several_teachers(rows)
    named = (f"{row['apart_from']}{several * (' of ' + str(row.get('of')))}" for row in rows if row.get("apart_from"))
    return list(dict.fromkeys(named))


def columns(rows: Sequence[Row]) -> list[Column]:
    """Those of which some row has a value; of a figure that is also told relative to the reference, that alone."""
    there = {column.key: column for column in COLUMNS if any(row.get(column.key) is not None for row in rows)}
    return [column for key, column in there.items() if f"{key}_relative" not in there]


def table(rows: Sequence[Row]) -> list[Line]:
    """The teacher's rows, then the students', most steps first; of equal rows of several runs one.

    Of several runs the best student of each column is marked, but for distances to different teachers' pictures.
    """
    unique: list[Row] = []
    for row in rows:
        shared = row["who"] != "student"  # several runs have the same teacher
        if not (shared and any(_same(row, other) for other in unique)):
            unique.append(row)
    ordered = sorted(unique, key=lambda row: (row["who"] == "student", -row.get("steps", 0), -(row.get("guidance") or 1)))
    shown, best = columns(ordered), {}
    for column in shown:
        values = [row[column.key] for row in ordered if row["who"] == "student" and row.get(column.key) is not None]
        if column.key.startswith("fidelity") and len(apart(ordered)) > 1:
            continue
        if column.better and len({row["run"] for row in ordered if row["who"] == "student"}) > 1 < len(set(values)):
            best[column.key] = min(values) if column.better == "lower" else max(values)
    several = several_teachers(rows)
    return [_line(row, shown, best, several) for row in ordered]


def tiles(rows: Sequence[Row], steps: int | None) -> list[Tile]:
    """The student in so many steps (None: in the most) beside the teacher's row of most steps, guided if it was."""
    students = [row for row in rows if row["who"] == "student"]
    main = [row for row in students if row.get("steps") == steps] or sorted(students, key=lambda row: -row.get("steps", 0))
    if not main:
        return []
    teachers = [row for row in rows if row["who"] == "teacher"]
    teacher = max(teachers, key=lambda row: (row.get("steps", 0), row.get("guidance") or 1), default={})
    made = []
    for column in (column for column in columns(main[:1]) if column.key in TILES):
        value, other = written(column, main[0]), written(column, teacher)
        unit = f" {column.unit}" * bool(column.unit)
        made.append(Tile(column.head, value + unit, other and other + unit))
    return made


def written(column: Column, row: Row) -> str:
    """A row's number in a column; empty if it has none."""
    value = row.get(column.key)
    return "" if value is None else format(column.factor * value, column.form)


def quality(rows: Sequence[Row]) -> Column | None:
    """What is plotted against network evaluations."""
    there = {column.key: column for column in columns([row for row in rows if row.get("nfe")])}
    return next((there[key] for key in QUALITY if key in there), None)


def _line(row: Row, shown: Sequence[Column], best: Mapping[str, float], several: bool) -> Line:
    """several: whether there are other teachers than this row's."""
    steps, guidance = row.get("steps"), row.get("guidance")
    taken = "" if steps is None else f", {steps} step{'s' * (steps != 1)}"
    guided = "" if guidance is None else f"guided {guidance:g}" if guidance != 1 else "unguided"
    how = "" if row["who"] == "student" else ", ".join(filter(None, (guided, row.get("solver"), row["of"] if several else "")))
    cells = []
    for column in shown:
        ends = [row.get(key) for key in column.span or ()]
        span = " \N{EN DASH} ".join(format(column.factor * x, column.form) for x in ends) if ends and None not in ends else ""
        winner = row["who"] == "student" and column.key in best and row.get(column.key) == best[column.key]
        cells.append(Cell(written(column, row), span, winner))
    return Line(row["run"], row["who"], taken, how, row["who"] == "student", cells)


def _same(one: Row, other: Row) -> bool:
    return all(one.get(key) == other.get(key) for key in ("of", "who", "steps", "guidance", "solver", "n", "fd", "clip"))
