"""Samples while a run trains: fixed prompts, fixed noise, the teacher's rows beside the student's.

The folder holds <step>.png, a grid with labels; and in pictures/teacher and pictures/<step> the single pictures, as
<who>-<steps>steps/<index>.png (.webp above 128 pixels), prompts.json (a list) and seed.json (of the noise).
"""

from __future__ import annotations

import shutil
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .. import distributed
from ..assemble import Distillation
from ..data.prompts import read_prompts
from ..data.texts import Texts
from ..files import beside
from ..sampling import Inference, trailing
from ..show import Line
from .pictures import save_prompts
from .walks import Walk, sampler, student_walk

COLUMNS, CELL, MARGIN, HEAD = 8, 128, 150, 64  # pictures a row; pixels: a picture's width, of row labels, of prompts
KEPT = 512  # pixels: the greatest width of a single picture


class Samples:
    """Writes folder/<step>.png and the single pictures; the teacher's rows are made once."""

    def __init__(self, distillation: Distillation, folder: Path, line: Line):
        self.distillation, self.folder, self.line = distillation, folder, line
        recipe = distillation.recipe
        self.prompts = list(recipe.eval.prompts or spread(read_prompts(recipe.data.prompts, 64), COLUMNS))
        self.texts = Texts(distillation.family, self.prompts)  # encoded once: training needs no encoders
        self.scale = teacher_scale(distillation)
        self.teacher: dict[int, np.ndarray] = {}
        self.last: np.ndarray | None = None

    def __call__(self, step: int) -> Path:
        """One grid: the teacher at 25 steps, then at each number of steps the teacher above the student.

        All is drawn before anything is written: networks in shares run on all processes, of which one alone meets the disk.
        """
        distillation, rows, kept = self.distillation, [], []
        for n in dict.fromkeys((25, *distillation.counts)):
            calls = n * (1 if self.scale == 1 else 2)
            label = f"teacher\n{plural(n)}, guided {self.scale:g}\n{calls} evaluations"
            if n not in self.teacher:
                self.teacher[n] = self.pictures(guided_teacher(distillation, n))
                kept.append(("teacher", f"teacher-{n}steps", self.teacher[n]))
            rows.append((label, self.teacher[n]))
            if n in distillation.counts:
                made = self.pictures(student_walk(distillation, distillation.inference(n)))
                rows.append((f"student\n{plural(n)}\nat iteration {step}", made))
                kept.append((f"{step:06d}", f"student-{n}steps", made))
        self.warn_if_inert(step)
        path = self.folder / f"{step:06d}.png"
        if distributed.rank() == 0:
            for row in kept:
                self.keep(*row)
            with beside(path) as tmp:
                draw_grid(rows, self.prompts).save(tmp, "PNG")
        return path

    def pictures(self, walk: Walk) -> np.ndarray:
        wanted = self.distillation.recipe.eval
        return sampler(self.distillation, walk, wanted.seed, wanted.batch, self.texts)(self.prompts, 0)

    def keep(self, shelf: str, row: str, pictures: np.ndarray) -> None:
        """Write a row's pictures one by one, beside their prompts and the seed of their noise."""
        folder = self.folder / "pictures" / shelf
        save_prompts(folder, self.prompts, self.distillation.recipe.eval.seed)
        keep_pictures(folder / row, pictures)

    @torch.no_grad()
    def warn_if_inert(self, step: int) -> None:
        """Say so if the trained student still predicts exactly what the teacher does."""
        roles = self.distillation.students()
        device = roles.teacher.net.device
        cond = {name: x.to(device) for name, x in self.texts(self.prompts[:1]).items()}
        x = torch.ones(1, *self.distillation.family.shape, device=device)
        hop = next(hop for hop in self.distillation.inference().hops if hop.role.startswith("student"))
        t = x.new_full([1], hop.time)
        if step and torch.equal(roles[hop.role](x, t, cond).x0, roles.teacher(x, t, cond).x0):
            self.line.say(f"warning: after {step} steps the student still equals the teacher; is its learning rate too low?")


def guided_teacher(distillation: Distillation, n: int) -> Walk:
    """n first-order steps of the guided teacher."""
    hops = trailing(distillation.roles.schedule.grid(n), "teacher", teacher_scale(distillation))
    return student_walk(distillation, Inference(hops, renoise=False))


def teacher_scale(distillation: Distillation) -> float:
    """The guidance scale of the teacher's rows: what the strategy distils (the middle, if it is a range)."""
    scale = getattr(distillation.strategy, "guidance", 1.0)
    return scale if isinstance(scale, float | int) else round(sum(scale) / len(scale), 3)


def spread(items: list[str], n: int) -> list[str]:
    """n items at equal distances."""
    return [items[i * len(items) // n] for i in range(min(n, len(items)))]


def plural(n: int) -> str:
    return f"{n} step" + "s" * (n != 1)


def keep_pictures(folder: Path, pictures: np.ndarray) -> None:
    """Write uint8 [N, H, W, 3] as folder/00000.png, ...; wide ones as .webp, a tenth of the bytes, at most KEPT pixels wide."""
    folder.mkdir(parents=True, exist_ok=True)
    for k, picture in enumerate(map(Image.fromarray, pictures)):
        if picture.width > KEPT:
            picture = picture.resize((KEPT, round(picture.height * KEPT / picture.width)), Image.LANCZOS)
        kind, options = ("png", {}) if picture.width <= CELL else ("webp", {"quality": 90})
        with beside(folder / f"{k:05d}.{kind}") as tmp:
            picture.save(tmp, kind, **options)


def forget(folder: Path, at: int) -> None:
    """Remove the samples of steps later than `at`, which a resumed run makes again."""
    later = [file for file in folder.glob("*.png") if file.stem.isdecimal() and int(file.stem) > at]
    shelves = [shelf for shelf in folder.glob("pictures/*") if shelf.name.isdecimal() and int(shelf.name) > at]
    for file in later:
        file.unlink()
    for shelf in shelves:
        shutil.rmtree(shelf)


def draw_grid(rows: list[tuple[str, np.ndarray]], prompts: list[str]) -> Image.Image:
    """Rows of (label, uint8 pictures [N, H, W, 3], all of one size) under their prompts."""
    font = ImageFont.load_default(13)
    small = ImageFont.load_default(11)
    height, width = rows[0][1].shape[1:3]
    tall = round(CELL * height / width)  # of a cell that is CELL wide
    grid = Image.new("RGB", (MARGIN + CELL * len(prompts), HEAD + tall * len(rows)), "white")
    pen = ImageDraw.Draw(grid)
    for k, prompt in enumerate(prompts):
        lines = textwrap.wrap(prompt, 22)
        text = "\n".join(lines[:4]) + (" ..." if len(lines) > 4 else "")
        pen.multiline_text((MARGIN + CELL * k + 5, 4), text, "black", small, spacing=2)
    for r, (label, pictures) in enumerate(rows):
        pen.multiline_text((8, HEAD + tall * r + tall // 2 - 26), label, "black", font, spacing=4)
        for k, picture in enumerate(pictures):
            cell = Image.fromarray(picture).resize((CELL - 4, tall - 4), Image.NEAREST if width < CELL else Image.LANCZOS)
            grid.paste(cell, (MARGIN + CELL * k + 2, HEAD + tall * r + 2))
    return grid
