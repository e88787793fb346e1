"""Meters of the embedded world: what its judge reads in pictures of its captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np

from ..tiny.judge import judge_key, load_judge, look
from ..tiny.world import Scene
from .meters import Figures, distances
from .readings import mean_scores, scored, spread, variances
from .rows import Rows
from .variety import vendi

if TYPE_CHECKING:
    from .references import Reference


class Judged:
    """Distances from drawings in the judge's features, and how well pictures show what their captions state."""

    name = "judged"

    def __init__(self, reference: Reference):
        self.judge, self.reference = load_judge(), reference
        about = {"weights": judge_key()[:16], "filter": "none", "reference": reference.about["hash"]}
        self.about = {"features": {"judge": about}}

    def keep(self, pictures: np.ndarray, prompts: Sequence[str], first: int) -> Rows:
        features, readings = look(self.judge, pictures)
        scores, kinds = scored([Scene.parse(prompt) for prompt in prompts], readings)
        return {"rows": features.astype(np.float32), "scores": scores, "kinds": kinds}

    def figures(self, rows: Rows) -> Figures:
        return {**asdict(mean_scores(rows["scores"], rows["kinds"])), **distances(rows["rows"], self.reference)}


class Spread:
    """How diverse pictures of one caption are, relative to drawings. Sees whole groups, and keeps a row of each.

    drawings: [captions, 3, 4], `variances` of many drawings of each caption.
    """

    name = "spread"

    def __init__(self, group: int, drawings: np.ndarray):
        self.judge, self.group, self.drawings, self.about = load_judge(), group, drawings, {}

    def keep(self, pictures: np.ndarray, prompts: Sequence[str], first: int) -> Rows:
        features, readings = look(self.judge, pictures)
        groups = [slice(i, i + self.group) for i in range(0, len(pictures), self.group)]
        return {
            "variances": np.array([variances(Scene.parse(prompts[one.start]), readings[one]) for one in groups]),
            "vendi": np.array([vendi(features[one]) for one in groups]),
        }

    def figures(self, rows: Rows) -> Figures:
        found = spread(rows["variances"], self.drawings)
        names = {name: "diversity" if name == "mean" else f"diversity_{name}" for name in found._fields}
        return {names[name]: value for name, value in found._asdict().items()} | {"vendi": float(rows["vendi"].mean())}
