"""The table of an evaluation: the teacher with stock solvers, guided and not, above the student; and what its columns mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from .candidates import label

FEW = 10_000  # pictures below which a Frechet distance in 2048 features mostly shows how few they are


class Column(NamedTuple):
    head: str
    width: int
    cell: Callable[[Mapping[str, Any]], str | None]  # of a row; None: it has no such figure
    means: str  # a line below the table; {floor} is filled in, an empty one is left out


def number(name: str, form: str, scale: float = 1) -> Callable[[Mapping[str, Any]], str | None]:
    """One figure of a row, in a format."""
    return lambda row: None if row.get(name) is None else format(scale * row[name], form)


def interval(row: Mapping[str, Any]) -> str | None:
    return None if row.get("fd_low") is None else f"{row['fd_low']:.2f} .. {row['fd_high']:.2f}"


TINY = (
    Column("calls", 6, number("nfe", "d"), "calls: network evaluations a picture; guidance makes two of each step."),
    Column("FD", 7, number("fd", ".2f"), "FD: Frechet distance to drawings, lower is better; other drawings have {floor:.2f}."),
    Column("95 % interval", 17, interval, ""),
    Column("recall", 8, number("recall", ".2f"), "recall: share of the drawings that have pictures like them; 1 is all."),
    Column("aligned", 9, number("alignment", ".1%"), "aligned: share of what captions state that a judge finds there."),
    Column("diverse", 9, number("diversity", ".2f"), "diverse: spread of the pictures of one caption; 1 is its drawings'."),
    Column("colour", 8, number("saturation_relative", ".2f"), "colour: saturation relative to the drawings'; 1 is theirs."),
    Column("apart", 7, number("fidelity", ".2f"), "apart: distance (RMS) from pictures of the same noise by the {apart}."),
    Column("ms", 8, number("ms", ".1f"), "ms: of one picture on this machine, decoding included."),
)
OWN = (
    TINY[0],
    Column("FID", 8, number("fd", ".2f"), "FID: Frechet distance to the reference, lower is better, at equal n."),
    Column("KID x1000", 11, number("kid", ".2f", 1000), "KID: kernel distance to it, lower is better, at any n."),
    Column("patch", 8, number("patch_fd", ".2f"), "patch: FID of the middle 299 pixels, not resized: of fine detail."),
    Column("CMMD", 7, number("cmmd", ".3f"), "CMMD: kernel distance in CLIP's features. Lower is better."),
    Column("recall", 8, number("recall", ".2f"), "recall: share of the reference that has pictures like it."),
    Column("CLIP", 7, number("clip", ".3f"), "CLIP: cosine of picture and prompt; higher fits better."),
    Column("HPS", 7, number("hps", ".3f"), "HPS: what people prefer, as HPSv2.1 guesses it."),
    Column("reward", 8, number("image_reward", ".2f"), "reward: what people prefer, as ImageReward guesses it."),
    Column("differ", 8, number("variety", ".2f"), "differ: 1 - SSIM of two pictures of one prompt."),
    Column("apart", 7, TINY[7].cell, TINY[7].means),
    Column("ms", 9, number("ms", ".1f"), TINY[8].means),
)


def render(rows: Sequence[Mapping[str, Any]], provenance: Mapping[str, Any]) -> str:
    """The table as text: rows of one provenance, those columns of which some row has a figure."""
    tiny = provenance["compared"]["preset"] == "tiny"
    columns = [column for column in (TINY if tiny else OWN) if any(column.cell(row) is not None for row in rows)]
    head = f"{'':<28}" + "".join(f"{column.head:>{column.width}}" for column in columns)
    rule = "-" * len(head)
    lines = ["", head, rule]
    for row in sorted(rows, key=lambda row: (row["who"] == "student", -row["steps"], -row["guidance"])):
        cells = "".join(f"{column.cell(row) or '-':>{column.width}}" for column in columns)
        lines.append(f"{label(row):<28}{cells}  {row['solver']}".rstrip())
    apart = next((row["apart_from"] for row in rows if row.get("apart_from")), "teacher")
    told = {"floor": provenance["told"].get("floor"), "apart": apart}
    lines += [rule, *(column.means.format(**told) for column in columns if column.means), *warnings(rows, tiny)]
    return "\n".join(lines)


def warnings(rows: Sequence[Mapping[str, Any]], tiny: bool) -> list[str]:
    """What a reader should know before comparing."""
    least = min((row["n"] for row in rows if row.get("fd") is not None), default=FEW)
    if tiny or least >= FEW:
        return []
    return [f"{least} pictures are few: this FID lies well above that of {FEW:,} or more, and KID tells more."]
