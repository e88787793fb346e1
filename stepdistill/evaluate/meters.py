"""Meters: what is kept of each picture while pictures are made, and the figures that follow from all that was kept.

Whatever is kept depends on one picture (of a group: on one group) alone, so no batch, no process and no interruption shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .colour import COLOURS, colour
from .frechet import frechet_interval
from .likeness import likeness
from .manifold import precision_recall
from .mmd import cmmd, kid
from .rows import Rows
from .variety import pairwise_lpips, pairwise_ssim_distance, vendi

if TYPE_CHECKING:
    import torch

    from .clip import Score
    from .features import Features
    from .references import Reference

MANIFOLD = 10_000  # pictures of either side that precision and recall look at: their time grows with the square

Figures = dict[str, float | None]


class Meter(Protocol):
    name: str  # of what it keeps
    about: dict[str, Any]  # what decides its figures besides the pictures

    def keep(self, pictures: np.ndarray, prompts: Sequence[str], first: int) -> Rows:
        """Rows of pictures uint8 [N, H, W, 3] of these prompts; first: the place of the first one among all."""

    def figures(self, rows: Rows) -> Figures:
        """Figures of the rows of all pictures."""


class Distances:
    """How far pictures are from a reference in the features of one network. prefix: of the figures' names."""

    def __init__(self, features: Features, reference: Reference, prefix: str = ""):
        self.features, self.reference, self.prefix = features, reference, prefix
        self.name = f"{prefix}features"
        self.about = {"features": {features.name: {"filter": features.filter, "reference": reference.about["hash"]}}}

    def keep(self, pictures: np.ndarray, prompts: Sequence[str], first: int) -> Rows:
        return {"rows": self.features(pictures)}

    def figures(self, rows: Rows) -> Figures:
        return {self.prefix + name: value for name, value in distances(rows["rows"], self.reference).items()}


def distances(features: np.ndarray, reference: Reference) -> Figures:
    """Frechet and kernel distance, precision, recall, density and coverage of features [N, D] against a reference.

    Of a reference that is no more than moments there is the Frechet distance alone.
    """
    fd, low, high = frechet_interval(features, reference.moments)
    if reference.features is None:
        return {"fd": fd, "fd_low": low, "fd_high": high}
    manifold = precision_recall(features[:MANIFOLD], reference.features[:MANIFOLD])
    return {"fd": fd, "fd_low": low, "fd_high": high, "kid": kid(features, reference.features)[0], **manifold._asdict()}


class Frechet(Distances):
    """The Frechet distance alone, as patch FID is told."""

    def figures(self, rows: Rows) -> Figures:
        return {f"{self.prefix}fd": frechet_interval(rows["rows"], self.reference.moments)[0]}


class Cmmd(Distances):
    """CMMD, on the features of CLIP."""

    def figures(self, rows: Rows) -> Figures:
        return {"cmmd": cmmd(rows["rows"], self.reference.features)}


class Scores:
    """One number a picture that says how well it fits its prompt: CLIP's cosine, or what people would prefer."""

    def __init__(self, name: str, score: Score):
        self.name, self.score = name, score
        self.about = {name: {"network": score.name, "prefix": score.prefix, "filter": score.filter}}

    def keep(self, pictures: np.ndarray, prompts: Sequence[str], first: int) -> Rows:
        return {"score": np.asarray(self.score(pictures, list(prompts)), np.float32)}

    def figures(self, rows: Rows) -> Figures:
        return {self.name: float(rows["score"].mean(dtype=np.float64))}


class Colour:
    """Saturation, contrast and brightness. like: their means over the reference; figures are also told relative to them."""

    name = "colour"

    def __init__(self, like: np.ndarray | None = None):
        self.like, self.about = like, {}

    def keep(self, pictures: np.ndarray, prompts: Sequence[str], first: int) -> Rows:
        return {"colour": colour(pictures).astype(np.float32)}

    def figures(self, rows: Rows) -> Figures:
        means = rows["colour"].mean(0, dtype=np.float64)
        found = dict(zip(COLOURS, means.tolist(), strict=True))
        if self.like is not None:
            found |= {f"{name}_relative": float(a / b) for name, a, b in zip(COLOURS, means, self.like, strict=True)}
        return found


class Variety:
    """How much the pictures of one prompt differ: mean pairwise 1 - SSIM, LPIPS where it is installed, and the Vendi score.

    Sees whole groups, and keeps a row of each.
    """

    name = "variety"

    def __init__(self, group: int, features: Features | None, lpips: bool, device: torch.device | str = "cpu"):
        self.group, self.features, self.lpips, self.device = group, features, lpips, device
        self.about = {"vendi": {"network": features.name, "filter": features.filter}} if features else {}

    def keep(self, pictures: np.ndarray, prompts: Sequence[str], first: int) -> Rows:
        groups = np.split(pictures, range(self.group, len(pictures), self.group))
        rows = {"dssim": [pairwise_ssim_distance(group, self.device) for group in groups]}
        if self.lpips:
            rows["lpips"] = [pairwise_lpips(group, self.device) for group in groups]
        if self.features is not None:
            rows["vendi"] = [vendi(self.features(group)) for group in groups]
        return {name: np.array(values, np.float32) for name, values in rows.items()}

    def figures(self, rows: Rows) -> Figures:
        names = {"dssim": "variety", "lpips": "variety_lpips", "vendi": "vendi"}
        return {names[name]: float(values.mean(dtype=np.float64)) for name, values in rows.items()}


class Shown:
    """The first pictures themselves: for people, and for `fidelity`."""

    name = "shown"

    def __init__(self, count: int):
        self.count, self.about = count, {}

    def keep(self, pictures: np.ndarray, prompts: Sequence[str], first: int) -> Rows:
        return {"pictures": pictures[: self.count - first]} if first < self.count else {}

    def figures(self, rows: Rows) -> Figures:
        return {}


def fidelity(pictures: np.ndarray, teacher: np.ndarray, lpips: bool, device: torch.device | str = "cpu") -> Figures:
    """Mean distances of pictures from the teacher's of the same noise and prompts, uint8 [N, H, W, 3]; lpips: where it is
    installed, that too."""
    names = {"rmse": "fidelity", "dssim": "fidelity_dssim", "lpips": "fidelity_lpips"}
    apart = likeness(pictures, teacher, device, lpips=lpips)
    return {names[name]: float(np.mean(x, dtype=np.float64)) for name, x in apart.items()}
