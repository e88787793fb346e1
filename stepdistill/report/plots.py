"""Plots as SVG that takes its colours and its typeface from the page around it, so that they follow dark mode and print."""

from __future__ import annotations

import io
import logging
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from .curves import Drawn

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# matplotlib wants colours that it knows: these stand for variables of the page until the drawing is done
COLOURS = {
    "ink": "#010101",
    "soft": "#020202",
    "rule": "#030303",
    "student": "#0a0a01",
    "teacher": "#0a0a02",
    "unguided": "#0a0a03",
    "other": "#0a0a04",
    **{f"run{k}": f"#0b0b{k:02d}" for k in range(1, 7)},
}
STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "svg.fonttype": "none",  # text stays text: smaller, and in the page's own typeface
    "text.parse_math": False,
    "axes.edgecolor": COLOURS["soft"],
    "axes.labelcolor": COLOURS["soft"],
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": COLOURS["rule"],
    "grid.linewidth": 0.8,
    "xtick.color": COLOURS["soft"],
    "ytick.color": COLOURS["soft"],
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "path.simplify_threshold": 0.3,
}


Point = tuple[float, float, float | None, float | None]  # evaluations, value, its interval


class Series(NamedTuple):
    """A line of the quality plot."""

    name: str
    colour: str  # one of COLOURS
    points: list[Point]
    who: str = "student"  # or teacher, or unguided: dashed, the latter with rings


def curve(key: str, name: str, drawn: Drawn, stages: Sequence[int], colour: str) -> str:
    """A logged number over the steps of training. key: the plot's own in its page; stages: steps at which a new one begins.

    The axis is logarithmic where the values span more than a factor of 30, but for a learning rate, which ends near 0.
    """
    with _figure(key) as figure:
        axes = figure.add_subplot()
        faint = len(drawn.trend) > 0
        axes.plot(drawn.steps, drawn.values, color=COLOURS[colour], lw=0.8 if faint else 1.6, alpha=0.35 if faint else 1)
        if faint:
            axes.plot(drawn.steps, drawn.trend, color=COLOURS[colour], lw=1.8)
        if len(drawn.steps) == 1:
            axes.plot(drawn.steps, drawn.values, "o", color=COLOURS[colour], ms=5)
        for step in stages:
            axes.axvline(step, color=COLOURS["soft"], lw=0.8, ls=(0, (3, 3)))
        low, high = drawn.values.min(), drawn.values.max()
        if low > 0 and high > 30 * low and not name.endswith("/lr"):
            _logarithmic(axes, "y", _decades(low, high))
        elif low >= 0:
            axes.set_ylim(bottom=0)
        axes.set_xlabel("step")
        axes.margins(x=0.02)
        return _svg(figure, f"{name} over the steps of training")


def quality(key: str, what: str, series: Sequence[Series], floor: float | None) -> str:
    """A figure against network evaluations a picture. key: the plot's own in its page; floor: a dotted line."""
    with _figure(key, (4.7, 3.1)) as figure:
        axes = figure.add_subplot()
        for k, one in enumerate(series):
            points = sorted(one.points, key=lambda point: point[0])
            x, y = [p[0] for p in points], [p[1] for p in points]
            student = one.who == "student"
            style = {"color": COLOURS[one.colour], "zorder": 3 + k}
            dots = {"ms": 6} if student else {"ms": 4.5, "mfc": "none" if one.who == "unguided" else style["color"]}
            axes.plot(x, y, "-o" if student else "--o", lw=2 if student else 1.3, **dots, **style)
            for at, _, low, high in points:
                if low is not None and high is not None:
                    axes.plot([at, at], [low, high], lw=1.2, **style)
        values = [p[1] for one in series for p in one.points]
        calls = sorted({p[0] for one in series for p in one.points})
        if min(values) > 0 and max(values) > 8 * min(values):
            _logarithmic(axes, "y", _decades(min(values), max(values)))
        elif min(values) >= 0:
            axes.set_ylim(bottom=0)
        if floor is not None:
            axes.axhline(floor, color=COLOURS["soft"], lw=0.8, ls=(0, (1, 2)))
        _logarithmic(axes, "x", _apart(calls))
        axes.set_xlabel("network evaluations a picture")
        axes.set_ylabel(what)
        axes.margins(x=0.05)
        return _svg(figure, f"{what} against network evaluations a picture")


def _logarithmic(axes: Axes, which: str, ticks: Sequence[float]) -> None:
    """A logarithmic axis with these ticks, as plain numbers."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _decades(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, 20, ... between low and high, or a power of ten each where those would be many."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    marks = (1, 2, 5) if len(powers) <= 5 else (1,)
    return [mark * 10.0**power for power in powers for mark in marks]


def _apart(calls: Sequence[float]) -> list[float]:
    """Those numbers that are at least a factor of 1.3 from the one before, so that their labels do not touch."""
    kept: list[float] = []
    for value in calls:
        if not kept or value >= 1.3 * kept[-1]:
            kept.append(value)
    return kept


@contextmanager
def _figure(key: str, size: tuple[float, float] = (4.6, 2.1)) -> Iterator[Figure]:
    """A figure of so many inches in STYLE, with ids that no figure of another key has; no state of matplotlib is changed."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # what it says of its caches is of no use here
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE | {"svg.hashsalt": key}):
        yield Figure(figsize=size, layout="constrained")


def _svg(figure: Figure, title: str) -> str:
    """The drawing as an <svg> for the inside of a page: no size, colours by variables, ids that are its own."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    head, _, body = text.partition(">")
    box = re.search(r'viewBox="[^"]*"', head)[0]
    body = re.sub(r' id="(?![pm][0-9a-f]{10})[^"]*"', "", body)  # groups' names: nothing refers to them
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)  # the page has its own
    body = re.sub(r"font: (?:\w+ )*?([\d.]+)px [^;\"]*", r"font-size: \1px", body)
    for variable, colour in COLOURS.items():
        body = body.replace(colour, f"var(--{variable})")
    body = re.sub(r"(\d+\.\d{2})\d+(?=[^<>]*>)", r"\1", body)  # of places: hundredths of a point are enough
    body = re.sub(r"\n\s*", "\n", body)
    return f'<svg {box} role="img" aria-label="{_escaped(title)}">{body.strip()}'


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
