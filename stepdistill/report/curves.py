"""The curves of training, each with what its strategy says of a healthy one."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ..explain import sections
from ..strategies import Strategy

POINTS = 400  # at most so many are drawn of a curve
SECTION = "Healthy curves"
EVERY = {  # what is logged whatever the strategy: of each player, and of looks at the student
    "lr": "The learning rate: warm-up, then the schedule of the recipe.",
    "grad_norm": "The gradient's norm before it is clipped to optim.clip.",
    "score": "How unlike the teacher's the student's pictures look (eval.watch): an energy distance, about 0 if alike.",
    "saturation": "Of the student's pictures, mean. A warning tells if it leaves the teacher's range.",
    "contrast": "Of the student's pictures, mean. A warning tells if it leaves the teacher's range.",
    "brightness": "Of the student's pictures, mean. A warning tells if it leaves the teacher's range.",
    "diversity": "How unlike each other pictures of one prompt are. A warning tells if it leaves the teacher's range.",
}


class Drawn(NamedTuple):
    """A curve as it is drawn."""

    steps: np.ndarray  # [<= POINTS]
    values: np.ndarray
    trend: np.ndarray  # at the same steps; empty where the curve is short or smooth


class Health(NamedTuple):
    """What a strategy says of its curves."""

    seen: str  # where they were seen
    lines: Mapping[str, str]  # "player/what" -> what is healthy
    sick: list[str]  # what is not, and what to do


def health(kind: type[Strategy] | None, logged: list[str]) -> Health:
    """What the docstring of a strategy says of these curves; a bullet belongs to each curve that it is the first to name."""
    paragraphs = sections(inspect.getdoc(kind) or "").get(SECTION, []) if kind else []
    seen, lines, sick = [], {}, []
    for item in (part for text in paragraphs for part in re.split(r"\n(?=- )", text)):
        words = " ".join(item.split())
        if not words.startswith("- "):
            seen.append(words)
        elif words.startswith("- Sick:"):
            said = words.removeprefix("- Sick:").strip()
            sick.append(said[:1].upper() + said[1:])
        else:
            for name in (name for name in re.findall(r"\w+/\w+", words) if name in logged):
                lines.setdefault(name, words[2:])
    for name in logged:
        lines.setdefault(name, EVERY.get(name.rpartition("/")[2], ""))
    return Health(" ".join(seen), lines, sick)


def drawn(steps: list[int], values: list[float]) -> Drawn:
    """At most POINTS of a curve: of each stretch of a longer one its least and its greatest value, in their order.

    The trend is a mean over a fifteenth of the curve, centred, from 40 values up; of a smooth curve there is none. Values that
    are not finite are left out.
    """
    x, y = np.array(steps), np.array(values, float)
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    rough = len(y) >= 40 and np.abs(np.diff(y, 2)).sum() > np.abs(np.diff(y)).sum()  # of noise 1.7 times as much
    trend = smoothed(y, len(y) // 15) if rough else np.array([])
    if len(x) > POINTS:
        stretches = np.array_split(np.arange(len(x)), POINTS // 2)
        kept = np.array(sorted({k for s in stretches for k in (s[np.argmin(y[s])], s[np.argmax(y[s])])}))
        x, y, trend = x[kept], y[kept], trend[kept] if len(trend) else trend
    return Drawn(x, y, trend)


def smoothed(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of the values at most width / 2 away, of fewer at the ends."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    at, half = np.arange(len(values)), width // 2
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)
