"""Sampling step by step, on the trainer's side: what a student takes the final picture to be at every step, beside its base
model, and base-first sampling. Both of arXiv:2503.10637, which calls the first DT-visualization, the other diversity
distillation. A stock pipeline shows no predictions, and has one network.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .assemble import Distillation, restore
from .devices import placed, tiled
from .errors import UserError
from .evaluate.grid import plural, teacher_scale
from .evaluate.walks import to_pixels
from .inference import pipeline_normal
from .roles import Roles
from .sampling import Hop, Inference, base_first, trailing, walk
from .serve import SUFFIXES, check_request, destination, words

BASE_STEPS = 25  # of the row that shows where the base model arrives
SMALL, LARGE = 192, 256  # pixels along a cell's width: pictures below SMALL are enlarged, those above LARGE made smaller
MARGIN, GAP, CAPTION = 170, 14, 34  # pixels: of the rows' labels, between cells, of the text above a cell


class Row(NamedTuple):
    """A sampler, as it is shown."""

    label: str
    cells: list[tuple[str, np.ndarray]]  # caption, uint8 picture [H, W, 3]


class Paths:
    """Samplers of a distillation from one prompt and one noise, which is what `serve.sample_run` begins with for this seed.

    (Not with pipelines that draw noise before they pack it, such as FLUX's.)
    """

    def __init__(self, distillation: Distillation, prompt: str, seed: int):
        self.distillation, self.family, self.seed = distillation, distillation.family, seed
        roles = distillation.students()
        # a stock pipeline has no autocast
        self.roles: Roles = roles.swap(**{name: replace(role, precision=None) for name, role in roles.items()})
        self.cond, self.null = self.family.encode_prompts([prompt]), self.family.null_prompts()

    def scale(self, how: Inference, asked: float | None = None) -> float:
        """The guidance scale of the base model: as asked, otherwise what the student is told or was distilled at.

        Raises:
            UserError: another than 1 is asked of a base model that cannot be guided.
        """
        if self.null is not None:
            return asked or how.guidance or teacher_scale(self.distillation)
        if asked not in (None, 1):
            raise UserError(f"--base-guidance {asked:g}: this base model's guidance is distilled into it; leave it out")
        return 1.0

    def latents(self, how: Inference) -> list[Tensor]:
        """The prediction of the final latents [1, ...] after every hop; the last is what sampling gives."""
        dtype, device = getattr(torch, self.distillation.recipe.model.dtype), self.family.pipe.device
        with torch.random.fork_rng():
            generator = torch.manual_seed(self.seed)
            noise = torch.randn(1, *self.family.shape, generator=generator, dtype=dtype).to(device).float()
            normal = pipeline_normal(self.family, dtype, generator, how)
            made = list(walk(self.roles, how, noise, self.cond, normal, self.null))
        return [*(p.x0 for p, _ in made[:-1]), made[-1][1]]

    def images(self, latents: Sequence[Tensor]) -> list[Tensor]:
        """Pixels [1, 3, H, W] (of videos [1, 3, frames, H, W]) of latents, in [-1, 1]."""
        with (
            torch.no_grad(),
            placed([self.family.pipe.vae], self.family.pipe.device),
            tiled(self.family.pipe.vae, self.family.size),
        ):
            return [self.family.decode(x) for x in latents]

    def row(self, who: str, how: Inference, columns: int) -> Row:
        """One sampler, after so many of its evaluations that are evenly spread, the last among them."""
        n, made = len(how.hops), self.latents(how)
        chosen = [round((k + 1) * n / columns) - 1 for k in range(columns)]
        pictures = [to_pixels(image)[0] for image in self.images([made[k] for k in chosen])]
        captions = [self.caption(how.hops[k], k + 1, n) for k in chosen]
        cost = how.nfe
        guided = {hop.scale for hop in how.hops} - {1}
        about = f"{who}\n{plural(n)}" + f", guided {max(guided, default=1):g}" * bool(guided)
        return Row(f"{about}\n{cost} evaluation{'s' * (cost > 1)}", list(zip(captions, pictures, strict=True)))

    def caption(self, hop: Hop, k: int, n: int) -> str:
        """Which step of how many it was, and its time, as the network hears it."""
        table = getattr(self.roles.schedule, "theta", None)
        time = f"time {hop.time:.3g}" if table is None else f"timestep {round(hop.time * (len(table) - 1))}"
        return f"step {k} of {n}" + " (final)" * (k == n) + f"\n{'base' if hop.role == 'teacher' else 'student'}, {time}"


def sample_stepwise(
    folder: Path,
    prompt: str,
    steps: int | None = None,
    seed: int = 0,
    out: Path | None = None,
    first: int = 0,
    show: bool = False,
    scale: float | None = None,
) -> Path:
    """Draw what `serve.sample_run` draws, but by the trainer's sampling, the first steps by the base model; returns its path.

    Args:
        folder: a run folder, of which the newest checkpoint counts, or an export folder.
        first: so many steps are the base model's.
        scale: of the base model's guidance, 1 or more; None: that which was distilled.
        show: the predictions of every step in one picture (PNG), beside those of the base model, in place of the last alone.

    Raises:
        UserError: as `serve.sample_run`, as `assemble.restore`, as `Paths.scale`, or no step is left to the student.
    """
    check_request(prompt, seed)
    distillation = restore(folder)
    how = distillation.inference(steps)
    check_first(distillation, len(how.hops), first)
    video = distillation.family.frames is not None
    name = f"{words(prompt)}_{len(how.hops)}steps_seed{seed}" + f"_base{first}" * (first > 0)
    out = destination(out, name + "_shown" * show, (".png",) if show else SUFFIXES[video])
    paths = Paths(distillation, prompt, seed)
    mixed = base_first(how, first, paths.scale(how, scale))
    if show:
        draw_rows(prompt, rows(paths, how, mixed)).save(out, optimize=True)
        return out
    (images,) = paths.images(paths.latents(mixed)[-1:])
    frames = [Image.fromarray(picture) for picture in to_pixels(images[0].transpose(0, 1) if video else images)]
    if video:
        frames[0].save(out, save_all=True, append_images=frames[1:], duration=round(1000 / distillation.family.fps), loop=0)
    else:
        frames[0].save(out)
    return out


def check_first(distillation: Distillation, n: int, first: int) -> None:
    """Raises UserError if the first steps leave none of n to the student."""
    if first < n:
        return
    if n > 1:
        raise UserError(f"--base-first-steps {first} of {n} steps leave none to the student; give at most {n - 1}")
    more = [steps for steps in distillation.counts if steps > 1]
    remedy = f"sample in more: --steps {min(more)}" if more else "leave it out: this student takes no more steps"
    raise UserError(f"--base-first-steps {first} of 1 step leaves none to the student; {remedy}")


def rows(paths: Paths, how: Inference, mixed: Inference) -> list[Row]:
    """The student (base-first above alone, if that is another), and its base model in the same steps and in BASE_STEPS.

    The base model steps deterministically, first DDIM or Euler, as in the sample grids.
    """
    scale, n = paths.scale(how), len(how.hops)
    same = tuple(hop._replace(role="teacher", scale=scale) for hop in how.hops)
    far = trailing(paths.roles.schedule.grid(BASE_STEPS), "teacher", scale)
    first = [paths.row("base first,\nthen student", mixed, n)] if mixed != how else []
    return [
        *first,
        paths.row("student", how, n),
        *(paths.row("base model", Inference(hops, renoise=False), n) for hops in (same, far)),
    ]


def draw_rows(title: str, shown: Sequence[Row]) -> Image.Image:
    """Rows of cells with captions and labels, under a title."""
    font, small, large = (ImageFont.load_default(size) for size in (14, 12, 17))
    height, width = shown[0].cells[0][1].shape[:2]
    wide = width * (SMALL // width) if width < SMALL else min(width, LARGE)
    tall, columns = round(height * wide / width), len(shown[0].cells)
    whole = MARGIN + columns * (wide + GAP) + GAP
    lines = textwrap.wrap(title, max(30, whole // 9))
    head = 22 * len(lines) + 46
    sheet = Image.new("RGB", (whole, head + len(shown) * (CAPTION + tall + GAP) + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    pen.multiline_text((GAP, GAP), "\n".join(lines), "black", large, spacing=5)
    pen.text(
        (GAP, head - 28),
        "What each network takes the final picture to be, step by step (its prediction of x0)",
        "#666666",
        small,
    )
    for r, (label, cells) in enumerate(shown):
        top = head + r * (CAPTION + tall + GAP)
        pen.multiline_text((GAP, top + CAPTION + tall // 2 - 28), label, "black", font, spacing=5)
        for k, (caption, picture) in enumerate(cells):
            left = MARGIN + k * (wide + GAP)
            pen.multiline_text((left, top), caption, "#444444", small, spacing=3)
            cell = Image.fromarray(picture).resize((wide, tall), Image.NEAREST if wide >= width else Image.LANCZOS)
            sheet.paste(cell, (left, top + CAPTION))
            pen.rectangle((left - 1, top + CAPTION - 1, left + wide, top + CAPTION + tall), outline="#cccccc")
    return sheet
