"""When a training has gone wrong although every number is finite: a loss that explodes, a student that leaves its teacher.

Pure: numbers in, words out. What `Watch` remembers is plain, goes into a checkpoint, and comes back from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import Any

WINDOW, ENOUGH, RECENT = 400, 50, 10  # iterations: of which a loss has its usual size, at the least so many; of its size now
UNIT = 1e-3  # losses are of latents, whose spread is about 1: a usual size below this counts as this


class Watch:
    """The sizes of each player's last losses, and whether those have exploded.

    The size now is the median size of the last RECENT losses: a single wild batch, or four, move it little. The usual size is
    the median of the WINDOW before them. Sizes are absolute values, for sCM's loss may be negative; where a loss crosses zero,
    or begins near it, its usual size is small without anything being wrong, so it counts as UNIT at least.
    """

    def __init__(self, factor: float | None):
        """factor: so many times the usual size is an explosion; None: nothing is."""
        self.factor = factor
        self.sizes: dict[str, list[float]] = {}

    def __call__(self, losses: Mapping[str, float]) -> tuple[str, float, float] | None:
        """Take the losses of an iteration, finite, by player; the player that has exploded, its usual size and that now."""
        for who, loss in losses.items():
            sizes = self.sizes.setdefault(who, [])
            sizes.append(abs(loss))
            del sizes[: -WINDOW - RECENT]
            past, recent = sizes[:-RECENT], sizes[-RECENT:]
            if self.factor is None or len(past) < ENOUGH:
                continue
            usual, now = max(median(past), UNIT), median(recent)
            if now > self.factor * usual:
                return who, usual, now
        return None

    def forget(self) -> None:
        """Another stage has other losses."""
        self.sizes = {}

    def state(self) -> dict[str, Any]:
        """What must survive, as plain JSON."""
        return {"sizes": {who: list(sizes) for who, sizes in self.sizes.items()}}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.sizes = {who: [float(size) for size in sizes] for who, sizes in state.get("sizes", {}).items()}


@dataclass(frozen=True)
class Range:
    """Where a figure of the teacher's pictures lies: its mean, and the spread (standard deviation) from picture to picture."""

    mean: float
    spread: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Range:
        return cls(fmean(values), stdev(values) if len(values) > 1 else 0.0)

    def side(self, value: float) -> str | None:
        """Where a student's mean has left it: "high" or "low", by more than one spread; None: it is inside."""
        if abs(value - self.mean) <= self.spread:
            return None
        return "high" if value > self.mean else "low"


def left(teacher: Mapping[str, Range], student: Mapping[str, float]) -> dict[str, str]:
    """The figures of a student that have left the teacher's range, and to which side."""
    sides = {name: teacher[name].side(value) for name, value in student.items() if name in teacher}
    return {name: side for name, side in sides.items() if side}


# figure and side -> keys that mend it, the likeliest first, with what to do with them; those that a recipe lacks are left out
KNOBS: dict[tuple[str, str], tuple[tuple[str, str], ...]] = {
    ("saturation", "high"): (("strategy.guidance", "lower"), ("optim.student_lr", "lower"), ("train.ema", "set")),
    ("saturation", "low"): (("strategy.guidance", "raise"), ("optim.student_lr", "lower")),
    ("contrast", "high"): (("strategy.guidance", "lower"), ("optim.student_lr", "lower"), ("train.ema", "set")),
    ("contrast", "low"): (("strategy.guidance", "raise"), ("strategy.student_every", "raise"), ("optim.student_lr", "lower")),
    ("brightness", "high"): (("optim.student_lr", "lower"), ("strategy.guidance", "lower")),
    ("brightness", "low"): (("optim.student_lr", "lower"), ("strategy.guidance", "lower")),
    ("diversity", "low"): (
        ("strategy.student_every", "raise"),  # the critic keeps up with the student
        ("strategy.gan", "lower"),
        ("strategy.guidance", "lower"),
        ("optim.student_lr", "lower"),
    ),
    ("diversity", "high"): (("optim.student_lr", "lower"), ("train.ema", "set"), ("strategy.student_every", "raise")),
}


def advice(name: str, side: str, values: Mapping[str, Any]) -> Iterator[str]:
    """What to do about a figure that left the range. values: the recipe's, plain, by dotted key."""
    for key, what in KNOBS[name, side]:
        if key not in values or (what == "set") == (values[key] is not None):
            continue
        value = values[key]
        least = 1 if key == "strategy.guidance" else 0
        if what != "lower" or max(value if isinstance(value, list) else [value]) > least:
            yield f"set {key}, as to 0.99" if what == "set" else f"{what} {key}, which is {told(value)}"


def told(value: Any) -> str:
    """A value of a recipe as it is written there."""
    return f"[{', '.join(map(told, value))}]" if isinstance(value, list) else f"{value:g}"
