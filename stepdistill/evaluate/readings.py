"""Figures from what the judge read: alignment with captions, and diversity among pictures of one caption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations
from typing import NamedTuple

import numpy as np

from ..tiny.judge import Found, Reading
from ..tiny.world import RELATIONS, Scene, Thing


@dataclass(frozen=True)
class Alignment:
    """Means over captions: all, of 1, 2, 3 objects, of seen and held-out combinations; None where none is."""

    alignment: float | None  # share of stated attributes read right
    alignment_1: float | None
    alignment_2: float | None
    alignment_3: float | None
    alignment_seen: float | None
    alignment_held: float | None
    whole: float | None  # share of captions with everything right and no object too many
    whole_1: float | None
    whole_2: float | None
    whole_3: float | None
    whole_seen: float | None
    whole_held: float | None


class Diversity(NamedTuple):
    """Spread relative to drawings: 1 is as diverse as drawings, 0 is one picture. None: too little could be read."""

    mean: float | None  # of the three below
    position: float | None
    size: float | None
    shade: float | None


def match(scene: Scene, reading: Reading) -> tuple[Found | None, ...]:
    """For each stated thing the found one that it is, None if missing.

    Of all assignments the one with most sizes, colours and shapes right; among equals, one in which the relation holds.
    """
    found = (*reading.things, *(None for _ in range(len(scene.things) - len(reading.things))))
    return max(
        permutations(found, len(scene.things)),
        key=lambda chosen: (
            sum(_right(thing, one) for thing, one in zip(scene.things, chosen, strict=True)),
            _related(scene, chosen),
        ),
    )


def _right(thing: Thing, found: Found | None) -> int:
    """How many of the three attributes of a thing were found: 0 to 3."""
    return 0 if found is None else sum(a == b for a, b in zip(thing, found, strict=False))


def _related(scene: Scene, chosen: Sequence[Found | None]) -> bool:
    """Whether all are there and each neighbouring pair lies in the relation's direction, farther along than across."""
    if scene.relation is None or None in chosen:
        return False
    axis, direction = RELATIONS[scene.relation]
    steps = [(b.x - a.x, b.y - a.y) for a, b in pairwise(chosen)]
    return all(direction * step[axis] > abs(step[1 - axis]) for step in steps)


def score(scene: Scene, reading: Reading) -> tuple[float, bool]:
    """(share of stated attributes read right, whether all are and no other object is there).

    Stated are size, colour and shape of each thing, the relation if there is one, and the background.
    """
    chosen = match(scene, reading)
    right = sum(_right(thing, one) for thing, one in zip(scene.things, chosen, strict=True))
    right += _related(scene, chosen) + (reading.background == scene.background)
    stated = 3 * len(scene.things) + (scene.relation is not None) + 1
    return right / stated, right == stated and len(reading.things) == len(scene.things)


def alignment(scenes: Sequence[Scene], readings: Sequence[Reading]) -> Alignment:
    """How well pictures show what their captions state; reading i is of a picture of scene i."""
    return mean_scores(*scored(scenes, readings))


def scored(scenes: Sequence[Scene], readings: Sequence[Reading]) -> tuple[np.ndarray, np.ndarray]:
    """Of each picture its `score` [N, 2] and the kind of its caption [N, 2]: objects, and whether a combination is held out."""
    scores = [score(scene, reading) for scene, reading in zip(scenes, readings, strict=True)]
    kinds = [(len(scene.things), scene.held_out) for scene in scenes]
    return np.array(scores, np.float64).reshape(-1, 2), np.array(kinds, np.int64).reshape(-1, 2)


def mean_scores(scores: np.ndarray, kinds: np.ndarray) -> Alignment:
    """Means of `scored`, over all captions and over those of each kind."""
    of = {"": np.full(len(kinds), True)}
    of |= {f"_{count}": kinds[:, 0] == count for count in (1, 2, 3)}
    of |= {"_seen": kinds[:, 1] == 0, "_held": kinds[:, 1] == 1}

    def mean(column: int, is_one: np.ndarray) -> float | None:
        return float(scores[is_one, column].mean()) if is_one.any() else None

    names = enumerate(("alignment", "whole"))
    return Alignment(**{name + end: mean(k, is_one) for k, name in names for end, is_one in of.items()})


def variances(scene: Scene, readings: Sequence[Reading]) -> np.ndarray:
    """Variance of position, radius and shade of each thing among pictures of one caption, summed over x, y and r, g, b.

    A picture counts for a thing only if the thing was read right, so that no mistake passes for diversity.

    Returns:
        [3, 4] for up to three things: three variances and how many pictures they are from; NaN below two pictures.
    """
    table = np.full((3, 4), np.nan)
    table[:, 3] = 0
    chosen = [match(scene, reading) for reading in readings]
    for k, thing in enumerate(scene.things):
        right = [found[k] for found in chosen if _right(thing, found[k]) == 3]
        table[k, 3] = len(right)
        if len(right) > 1:
            values = np.array([(one.x, one.y, one.radius, *one.rgb) for one in right])  # [pictures, 6]
            x, y, radius, *rgb = values.var(0, ddof=1)
            table[k, :3] = x + y, radius, sum(rgb)
    return table


def diversity(scenes: Sequence[Scene], groups: Sequence[Sequence[Reading]], drawings: np.ndarray) -> Diversity:
    """Spread among pictures of one caption, relative to drawings of the same captions.

    Variances are divided by the drawings' own, thing by thing, and averaged with the weight (pictures - 1); the root of
    that is a ratio of spreads.

    Args:
        groups: groups[i] are the readings of pictures of scenes[i].
        drawings: [len(scenes), 3, 4], `variances` of many drawings of each scene.
    """
    table = np.array([variances(scene, group) for scene, group in zip(scenes, groups, strict=True)])
    return spread(table.reshape(-1, *drawings.shape[1:]), drawings)


def spread(table: np.ndarray, drawings: np.ndarray) -> Diversity:
    """Diversity of `variances` [C, 3, 4] of C captions, relative to those of many drawings [C, 3, 4] of each."""
    use = (table[..., 3] > 1) & (drawings[..., 3] > 1)
    if not use.any():
        return Diversity(None, None, None, None)
    ratios = table[use][:, :3] / drawings[use][:, :3]
    roots = np.sqrt(np.average(ratios, axis=0, weights=table[use][:, 3] - 1)).tolist()
    return Diversity(float(np.mean(roots)), *roots)
