"""The embedded world: 64x64 pictures of one to three coloured shapes, with captions, drawn by code.

A `Scene` is what a caption states; `draw` adds what it leaves open (position, exact size, shade, tilt, backdrop), so one
caption has many pictures. Everything is a pure function of a seed, and row i never depends on how many rows were asked for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

PIXELS = 64
SHAPES = ("circle", "square", "triangle", "cross", "ring", "bar")
PALETTE = {  # RGB in [0, 255]
    "red": (208, 30, 38),
    "orange": (244, 124, 8),
    "yellow": (246, 216, 40),
    "green": (40, 150, 62),
    "cyan": (44, 196, 210),
    "blue": (34, 70, 200),
    "purple": (122, 44, 160),
    "pink": (244, 132, 190),
}
COLOURS = tuple(PALETTE)
SIZES = ("small", "large")
RELATIONS = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}  # axis (0 is x), direction
BACKGROUNDS = ("plain", "gradient", "striped")
HELD_OUT = frozenset((SHAPES[(5 * i + 1) % 6], colour) for i, colour in enumerate(COLOURS))  # one shape a colour
COUNTS = (0.35, 0.40, 0.25)  # probability of one, two and three objects


class Thing(NamedTuple):
    size: str
    colour: str
    shape: str


@dataclass(frozen=True)
class Scene:
    """What a caption states. `relation` (None for one object) holds between each thing and the next."""

    things: tuple[Thing, ...]
    relation: str | None
    background: str

    @property
    def caption(self) -> str:
        names = [f"a {thing.size} {thing.colour} {thing.shape}" for thing in self.things]
        return f" {self.relation} ".join(names) + f" on a {self.background} background"

    @property
    def held_out(self) -> bool:
        """Whether some object has a combination of shape and colour that teachers never saw."""
        return any((thing.shape, thing.colour) in HELD_OUT for thing in self.things)

    @classmethod
    def parse(cls, caption: str) -> Scene:
        """The scene that a caption of this world's grammar states.

        Raises:
            ValueError: the caption is not of the form that `caption` writes.
        """
        words = "|".join
        things = re.findall(rf"a ({words(SIZES)}) ({words(COLOURS)}) ({words(SHAPES)})", caption)
        relation = re.search(words(RELATIONS), caption)
        background = re.search(rf"on a ({words(BACKGROUNDS)}) background$", caption)
        if background:
            scene = cls(tuple(Thing(*t) for t in things), relation[0] if relation else None, background[1])
            if scene.things and scene.caption == caption:
                return scene
        raise ValueError(
            f"caption {caption!r} is not of this world; write one such as "
            f"'a large red circle left of a small blue ring on a plain background'"
        )


def scenes(n: int, seed: int, split: str = "all") -> list[Scene]:
    """n scenes; scene i depends on seed and i alone.

    Args:
        split: "seen" (teachers train on these), "held" (the first object is a held-out combination) or "all".

    Raises:
        ValueError: split is none of the three.
    """
    if split not in ("seen", "held", "all"):
        raise ValueError(f"split {split!r} is not one of seen, held, all")
    table = np.random.default_rng([seed, 1]).random((n, 12))
    return [_scene(row, split) for row in table]


def _scene(u: np.ndarray, split: str) -> Scene:
    """One scene from 12 uniform numbers."""

    def pick(options, x):
        return options[int(x * len(options))]

    things = []
    for k in range(1 + int(np.searchsorted(np.cumsum(COUNTS)[:-1], u[0], side="right"))):
        colour = pick(COLOURS, u[3 + k])
        held = [shape for shape in SHAPES if (shape, colour) in HELD_OUT]
        if split == "all":
            shapes = SHAPES
        else:
            shapes = held if split == "held" and k == 0 else [shape for shape in SHAPES if shape not in held]
        things.append(Thing(pick(SIZES, u[9 + k]), colour, pick(shapes, u[6 + k])))
    relation = pick(tuple(RELATIONS), u[1]) if len(things) > 1 else None
    return Scene(tuple(things), relation, pick(BACKGROUNDS, u[2]))


class Drawings(NamedTuple):
    """Pictures, and where `draw` put things; objects beyond a scene's count are NaN."""

    images: np.ndarray  # [N, 64, 64, 3] uint8
    position: np.ndarray  # [N, 3, 2] centre (x, y) in pixels
    radius: np.ndarray  # [N, 3] pixels
    rgb: np.ndarray  # [N, 3, 3] in [0, 1]


def draw(scenes: list[Scene], seed: int) -> Drawings:
    """Draw each scene once, anti-aliased. Picture i depends on scene i, seed and i alone."""
    table = np.random.default_rng([seed, 2]).random((len(scenes), 32)).astype(np.float32)
    parts = [_draw(scenes[i : i + 512], table[i : i + 512]) for i in range(0, len(scenes), 512)]
    return Drawings(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _draw(scenes: list[Scene], u: np.ndarray) -> Drawings:
    """A chunk of at most a few hundred pictures from 32 uniform numbers each."""
    n = len(scenes)
    y, x = np.mgrid[:PIXELS, :PIXELS].astype(np.float32) + 0.5  # pixel centres
    canvas = _background(scenes, u[:, :8], x, y)
    position, radius, rgb = (np.full((n, 3, *extra), np.nan, np.float32) for extra in [(2,), (), (3,)])
    for k in range(3):
        rows = np.array([i for i, scene in enumerate(scenes) if len(scene.things) > k], int)
        v = u[rows, 8 + 8 * k : 16 + 8 * k]
        things = [scenes[i].things[k] for i in rows]
        position[rows, k] = np.array([_place(scenes[i], k, u[i, :8], w) for i, w in zip(rows, v, strict=True)]).reshape(-1, 2)
        crowd = np.array([len(scenes[i].things) == 3 for i in rows])
        large = np.array([thing.size == "large" for thing in things])
        radius[rows, k] = np.where(large, np.where(crowd, 9.0, 10.4) + v[:, 2] * np.where(crowd, 0.8, 2.4), 6.2 + v[:, 2])
        base = np.array([PALETTE[thing.colour] for thing in things], np.float32).reshape(-1, 3) / 255
        rgb[rows, k] = (base * (0.82 + 0.26 * v[:, 3:4]) + 0.04 * (v[:, 4:7] - 0.5)).clip(0, 1)
        tilt = 0.4 * (v[:, 7] - 0.5)
        for shape in SHAPES:
            pick = np.array([thing.shape == shape for thing in things], bool)
            if not pick.any():
                continue
            at = rows[pick]
            dx, dy = x - position[at, k, 0, None, None], y - position[at, k, 1, None, None]  # [M, 64, 64]
            c, s = np.cos(tilt[pick])[:, None, None], np.sin(tilt[pick])[:, None, None]
            distance = _distance(shape, c * dx + s * dy, c * dy - s * dx, radius[at, k][:, None, None])
            cover = np.clip(0.5 - distance, 0, 1)[..., None]
            canvas[at] += cover * (rgb[at, k][:, None, None] - canvas[at])
    return Drawings((canvas * 255).round().astype(np.uint8), position, radius, rgb)


def _place(scene: Scene, k: int, u: np.ndarray, v: np.ndarray) -> tuple[float, float]:
    """Centre of object k: on the axis of the relation at its rank, elsewhere near a line that the picture shares."""
    count = len(scene.things)
    if count == 1:
        return 15 + 34 * v[0], 15 + 34 * v[1]
    axis, direction = RELATIONS[scene.relation]
    rank = k if direction > 0 else count - 1 - k
    along = (15 + 34 * rank if count == 2 else 11 + 21 * rank) + (4 if count == 2 else 1) * (v[0] - 0.5)
    across = 19 + 26 * u[7] + 8 * (v[1] - 0.5)
    return (along, across) if axis == 0 else (across, along)


def _background(scenes: list[Scene], u: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """[N, 64, 64, 3] in [0, 1]: greyish, dark or light, with a faint tint."""
    tone = np.where(u[:, 0] < 0.5, 0.14 + 0.24 * u[:, 0], 0.62 + 0.24 * (u[:, 0] - 0.5))  # [N]
    away = np.where(u[:, 0] < 0.5, 1, -1)  # a second tone, towards the middle or beyond
    angle = (np.pi / 4 * np.floor(4 * u[:, 1]))[:, None, None]
    along = np.cos(angle) * (x - 32) + np.sin(angle) * (y - 32)  # [N, 64, 64] pixels
    period, phase = (14 + 4 * u[:, 2])[:, None, None], u[:, 3][:, None, None]
    wave = np.abs((along / period + phase) % 1 - 0.5) * 2  # 0..1, a triangle wave
    stripes = np.clip((wave - 0.5) * period / 2 + 0.5, 0, 1)
    ramp = np.clip(along / 84 + 0.5, 0, 1)
    kinds = np.array([BACKGROUNDS.index(scene.background) for scene in scenes])[:, None, None]
    step = np.select([kinds == 1, kinds == 2], [0.34 * ramp, 0.17 * stripes], 0.0)
    grey = tone[:, None, None] + away[:, None, None] * step
    tint = 0.06 * (u[:, 4:7] - 0.5)[:, None, None]
    return (grey[..., None] + tint).clip(0, 1).astype(np.float32)


def _distance(shape: str, x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Signed distance in pixels (negative inside), exact near straight edges; y points down."""
    if shape == "circle":
        return np.hypot(x, y) - r
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.88 * r
    if shape == "triangle":  # three half-planes at inradius h, point up
        h = 0.66 * r
        return np.maximum(y - 0.85 * h, 0.8660254 * abs(x) - 0.5 * y - h)
    if shape == "cross":
        long, thin = 1.05 * r, 0.36 * r
        return np.minimum(np.maximum(abs(x) - long, abs(y) - thin), np.maximum(abs(x) - thin, abs(y) - long))
    if shape == "ring":
        return abs(np.hypot(x, y) - 0.76 * r) - 0.26 * r
    if shape == "bar":
        return np.maximum(abs(x) - 1.02 * r, abs(y) - 0.42 * r)
    raise ValueError(f"shape {shape!r} is not one of {', '.join(SHAPES)}")
