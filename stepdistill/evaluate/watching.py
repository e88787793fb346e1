"""A student watched while it trains: a few pictures beside its teacher's, measured without any network.

The same prompts and noise each time, several pictures a prompt, at the student's own number of steps; the teacher's pictures,
guided and at 25 steps, are made once.
"""

from __future__ import annotations

import numpy as np
import torch

from ..assemble import Distillation
from ..data.prompts import read_prompts
from ..data.texts import Texts
from ..recipe import to_tree
from ..show import Line
from ..watch import Range, advice, left
from .colour import COLOURS
from .grid import guided_teacher, spread
from .looks import GROUPS, energy, in_units, looks, unlike
from .walks import Walk, sampler, student_walk

EACH, TEACHER_STEPS = 4, 25  # pictures a prompt, at the least; steps of the teacher


class Watching:
    """Measures the student, and warns when it leaves its teacher's range; once, until it is back."""

    def __init__(self, distillation: Distillation, line: Line):
        self.distillation, self.line = distillation, line
        recipe = distillation.recipe
        self.outside: dict[str, str] = {}  # figures that have been warned of, and the side
        self.ranges: dict[str, Range] = {}
        known = recipe.eval.prompts or read_prompts(recipe.data.prompts, 64)
        self.some = spread(list(known), recipe.eval.watch // EACH)
        self.each = recipe.eval.watch // max(1, len(self.some))
        self.texts = Texts(distillation.family, self.some) if self.some else None

    def __call__(self, step: int) -> dict[str, float]:
        """The student's figures after `step` iterations, as watch/<figure>, to be logged; nothing if nobody is to watch.

        watch/score is the distance from the teacher's looks, lower is better: see `energy`. The others are means over pictures;
        the teacher's range of each is its mean, give or take the standard deviation from picture to picture.
        """
        if not self.some:
            return {}
        if not self.ranges:
            self.teacher = looks(self.pictures(guided_teacher(self.distillation, TEACHER_STEPS)))
            self.ranges = {name: Range.of(values.tolist()) for name, values in self.figures(self.teacher).items()}
        student = looks(self.pictures(student_walk(self.distillation, self.distillation.inference())))
        means = {name: values.mean().item() for name, values in self.figures(student).items()}
        self.warn(step, means)
        rows = (in_units(x, self.teacher).reshape(len(self.some), self.each, -1) for x in (student, self.teacher))
        return {f"watch/{name}": value for name, value in ({"score": energy(*rows)} | means).items()}

    def pictures(self, walk: Walk) -> np.ndarray:
        wanted = self.distillation.recipe.eval
        prompts = [prompt for prompt in self.some for _ in range(self.each)]
        return sampler(self.distillation, walk, wanted.seed, wanted.batch, self.texts)(prompts, 0)

    def figures(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """What is watched of each picture [N]: COLOURS, and diversity among those of one prompt."""
        thumbnails, colours, _ = rows.split(GROUPS, 1)
        diversity = unlike(thumbnails.reshape(len(self.some), self.each, -1)).flatten()
        return dict(zip(COLOURS, colours.T, strict=True)) | {"diversity": diversity}

    def warn(self, step: int, means: dict[str, float]) -> None:
        outside = left(self.ranges, means)
        recipe = to_tree(self.distillation.recipe)
        values = {f"{section}.{key}": x for section in ("strategy", "optim", "train") for key, x in recipe[section].items()}
        for name, side in outside.items():
            if self.outside.get(name) != side:
                there, remedies = self.ranges[name], ", or ".join(advice(name, side, values))
                self.line.say(
                    f"warning: after {step} steps the {name} of the student's pictures, {means[name]:.3g}, is too {side}: the "
                    f"teacher's is {there.mean - there.spread:.3g} to {there.mean + there.spread:.3g}; "
                    f"{f'if it stays so: {remedies}' if remedies else 'train for longer'}"
                )
        self.outside = outside
