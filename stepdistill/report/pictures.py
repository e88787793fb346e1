"""The pictures of a report: found in a run folder, and put into the page itself.

A gallery folder holds <who>-<steps>steps/<index>.<kind>, prompts.json (a list; the index is a picture's, and its noise's)
and seed.json (of the noise).
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ..foreign import read_json

SMALL = 128  # pixels: pictures up to this width are kept exactly, and shown enlarged, each pixel a square
WIDE, FRAME = 512, 256  # pixels: the greatest width of other pictures; of those of which there is one a training step
FRAMES, PROMPTS = 24, 8  # at most so many steps, and prompts, are shown


class Strip(NamedTuple):
    """The pictures of one sampler, in the order of the prompts."""

    who: str
    steps: int
    files: list[Path | None]

    @property
    def title(self) -> str:
        return f"{self.who}, {self.steps} step{'s' * (self.steps != 1)}"


class Gallery(NamedTuple):
    prompts: list[str]
    seed: int | None  # of the noise; None: it was not noted
    strips: list[Strip]

    def find(self, who: str, steps: int | None = None) -> Strip | None:
        """That of who in so many steps; steps None: in the most."""
        fitting = [strip for strip in self.strips if strip.who == who and steps in (None, strip.steps)]
        return max(fitting, key=lambda strip: strip.steps, default=None)


class Film(NamedTuple):
    """Galleries of the student alone by step of training, all of the same prompts and noise; and the teacher's, if it was
    kept."""

    frames: dict[int, Gallery]
    teacher: Gallery | None
    left_out: list[int]  # steps at which other prompts, or other noise, were drawn

    @property
    def gallery(self) -> Gallery:
        """The teacher beside the student at the last step."""
        last = self.frames[max(self.frames)]
        return Gallery(last.prompts, last.seed, [*(self.teacher.strips if self.teacher else ()), *last.strips])


class Embedded(NamedTuple):
    """A picture as an address that holds it."""

    src: str
    width: int  # as it was drawn, in pixels
    height: int

    @property
    def small(self) -> bool:
        return self.width <= SMALL


def read_gallery(folder: Path) -> Gallery | None:
    """The gallery in a folder; None if there is none."""
    prompts, seed = (_json(folder / f"{name}.json") for name in ("prompts", "seed"))
    if not isinstance(prompts, list):
        return None
    strips = []
    for row in sorted(folder.glob("*-*steps*")):
        if row.name.endswith("-unguided") and row.with_name(row.name.removesuffix("-unguided")).exists():
            continue  # the guided teacher's say more
        if found := re.fullmatch(r"([a-z_]+)-(\d+)steps(?:-unguided)?", row.name):
            files = {int(file.stem): file for file in row.iterdir() if file.stem.isdecimal()}
            strips.append(Strip(found[1], int(found[2]), [files.get(k) for k in range(len(prompts))]))
    if not any(any(strip.files) for strip in strips):
        return None
    return Gallery([str(prompt) for prompt in prompts], seed if isinstance(seed, int) else None, strips)


def read_film(folder: Path) -> Film | None:
    """The pictures of samples/pictures; steps at which other prompts or noise were drawn than at the last are left out."""
    found = {int(shelf.name): read_gallery(shelf) for shelf in sorted(folder.glob("[0-9]*")) if shelf.name.isdecimal()}
    frames = {step: gallery for step, gallery in found.items() if gallery}
    if not frames:
        return None
    last, teacher = frames[max(frames)], read_gallery(folder / "teacher")
    same = {step: gallery for step, gallery in frames.items() if alike(gallery, last)}
    return Film(same, teacher if teacher and alike(teacher, last) else None, sorted(frames.keys() - same))


def alike(one: Gallery, other: Gallery) -> bool:
    """Whether pictures of equal index are of the same prompt and the same noise."""
    return (one.prompts, one.seed) == (other.prompts, other.seed)


def side_by_side(gallery: Gallery) -> list[Strip]:
    """What is worth comparing: the teacher at its most steps, the student, and the teacher in as few steps."""
    students = sorted((strip for strip in gallery.strips if strip.who == "student"), key=lambda strip: -strip.steps)
    best = gallery.find("teacher")
    same = [gallery.find("teacher", strip.steps) for strip in students]
    chosen = [best, *students, *(strip for strip in same if strip is not best)]
    return [strip for strip in chosen if strip]


def evenly(items: Sequence, most: int) -> list:
    """At most `most` of the items, at equal distances, the first and the last among them."""
    n = min(len(items), most)
    return [items[round(k * (len(items) - 1) / max(1, n - 1))] for k in range(n)]


def embed(path: Path | None, width: int = WIDE) -> Embedded | None:
    """The picture in a file, at most so wide; None where there is none, or none that can be read."""
    if path is None:
        return None
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # what Pillow raises on a bad picture
        return None
    if picture.width > width:
        picture = picture.resize((width, max(1, round(picture.height * width / picture.width))), Image.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "webp", **({"lossless": True} if picture.width <= SMALL else {"quality": 85}))
    return Embedded(f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}", *picture.size)


def _json(path: Path) -> Any:
    """The value in a JSON file; None if there is none."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None
