"""A small network that reads every attribute of the embedded world from a picture, and its features for FD.

It is trained on drawings alone (`python -m stepdistill.tiny.make judge`) and never enters training or the choice of a
checkpoint. Objects are found as points on a heat-map, each carrying its attributes (CenterNet, arXiv:1904.07850).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from .world import BACKGROUNDS, COLOURS, PIXELS, SHAPES, SIZES, Drawings, Scene

WEIGHTS = Path(__file__).with_name("judge.safetensors")
FEATURES = 64
GRID, CELL = 16, PIXELS // 16  # cells a side, pixels a cell
DAMAGES = ("blur", "noise", "mottle")  # strengths that training teaches the pooled features
MOST = 6  # objects that a reading reports
KINDS = {"shape": SHAPES, "colour": COLOURS, "size": SIZES}
CHANNELS = {"heat": 1, **{name: len(options) for name, options in KINDS.items()}, "offset": 2, "radius": 1, "rgb": 3}


class Found(NamedTuple):
    """One object as the judge reads it; x, y, radius in pixels, rgb in [0, 1]."""

    size: str
    colour: str
    shape: str
    x: float
    y: float
    radius: float
    rgb: tuple[float, float, float]


class Reading(NamedTuple):
    background: str
    things: tuple[Found, ...]  # the surest first, at most MOST


class Maps(NamedTuple):
    """What the network says before any decision."""

    cells: dict[str, Tensor]  # name -> [N, CHANNELS[name], GRID, GRID]; offsets in cells, radius in 10 pixels
    background: Tensor  # [N, 3] logits
    damage: Tensor  # [N, 3] estimated strengths of DAMAGES, each in [0, 1]
    features: Tensor  # [N, FEATURES], each of unit spread over drawings


class Targets(NamedTuple):
    """What `Maps` should say of a batch; `attributes` are those of the object nearest to each cell."""

    heat: Tensor  # [N, 1, GRID, GRID] in [0, 1]: exp(-d^2 / 2), d cells from the cell's centre to the nearest object's
    attributes: dict[str, Tensor]  # CHANNELS but heat; of KINDS the class [N, GRID, GRID], else as in Maps
    background: Tensor  # [N] class


class Block(nn.Module):
    """x + conv(conv(x)), each after GroupNorm and SiLU."""

    def __init__(self, channels: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(8, channels) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            y = conv(F.silu(norm(y)))
        return x + y


class Judge(nn.Module):
    """About 0.4M parameters: a fine path at 16x16 cells, a coarse one at 8x8, linear heads on 64 channels."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 24, 4, stride=2, padding=1), nn.SiLU(), nn.Conv2d(24, 48, 3, stride=2, padding=1), Block(48)
        )
        self.coarse = nn.Sequential(nn.Conv2d(48, 80, 3, stride=2, padding=1), Block(80), Block(80))
        self.fine, self.wide = nn.Conv2d(48, FEATURES, 1), nn.Conv2d(80, FEATURES, 1)
        self.last = nn.Sequential(Block(FEATURES), nn.GroupNorm(8, FEATURES), nn.SiLU())
        self.heads = nn.Conv2d(FEATURES, sum(CHANNELS.values()), 1)
        self.whole = nn.Linear(FEATURES, len(BACKGROUNDS) + len(DAMAGES))
        self.register_buffer("spread", torch.ones(FEATURES))  # of the pooled channels over drawings, set after training

    def trunk(self, x: Tensor) -> Tensor:
        """[N, 3, 64, 64] in [-1, 1] -> [N, FEATURES, GRID, GRID].

        Raises:
            ValueError: pictures of another shape.
        """
        if x.shape[1:] != (3, PIXELS, PIXELS):
            raise ValueError(f"pictures are {list(x.shape)}, the judge reads [N, 3, {PIXELS}, {PIXELS}]: resize them")
        x = self.stem(x)
        return self.last(self.fine(x) + F.interpolate(self.wide(self.coarse(x)), scale_factor=2))

    def forward(self, x: Tensor) -> Maps:
        """[N, 3, 64, 64] in [-1, 1] -> Maps."""
        trunk = self.trunk(x)
        cells = self.heads(trunk).split(tuple(CHANNELS.values()), dim=1)
        pooled = trunk.mean((2, 3))
        background, damage = self.whole(pooled).split((len(BACKGROUNDS), len(DAMAGES)), dim=1)
        return Maps(dict(zip(CHANNELS, cells, strict=True)), background, damage, pooled / self.spread)

    def features(self, x: Tensor) -> Tensor:
        """[N, 3, 64, 64] in [-1, 1] -> [N, FEATURES], each of unit spread over drawings."""
        return self(x).features


def to_net(images: np.ndarray) -> Tensor:
    """uint8 [N, 64, 64, 3] -> float [N, 3, 64, 64] in [-1, 1], channels last in memory."""
    x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
    return x.float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)


def load_judge() -> Judge:
    """The shipped judge, in float32 and evaluation mode.

    Raises:
        FileNotFoundError: the weights are not where the package keeps them.
    """
    if not WEIGHTS.exists():
        raise FileNotFoundError(
            f"{WEIGHTS} is missing; install stepdistill again, or remake it: "
            f"python -m stepdistill.tiny.make judge --work build/tiny"
        )
    judge = Judge()
    judge.load_state_dict({name: value.float() for name, value in load_file(WEIGHTS).items()})
    return judge.to(memory_format=torch.channels_last).requires_grad_(False).eval()


def judge_key() -> str:
    """sha256 of the weights file: figures made with another judge do not compare."""
    return hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()


def look(judge: Judge, images: np.ndarray, batch: int = 256) -> tuple[np.ndarray, list[Reading]]:
    """Features float64 [N, FEATURES] and readings of uint8 [N, 64, 64, 3], in one pass."""
    rows, readings = [np.empty((0, FEATURES))], []
    for i in range(0, len(images), batch):
        with torch.no_grad():
            maps = judge(to_net(images[i : i + batch]))
        rows.append(maps.features.double().numpy()), readings.extend(decide(maps))
    return np.concatenate(rows), readings


def read(judge: Judge, images: np.ndarray, batch: int = 256) -> list[Reading]:
    """Read each picture of uint8 [N, 64, 64, 3]: peaks of the heat-map above 0.5 and what their cells say."""
    return look(judge, images, batch)[1]


def decide(maps: Maps) -> list[Reading]:
    """Maps of N pictures -> N readings. A peak is the largest of its 3x3 cells."""
    heat = maps.cells["heat"].sigmoid()
    peaks = (heat * (heat == F.max_pool2d(heat, 3, stride=1, padding=1))).flatten(1)  # [N, GRID * GRID]
    score, at = peaks.topk(MOST)  # [N, MOST]
    values = {name: x.flatten(2).mT.take_along_dim(at[..., None], 1) for name, x in maps.cells.items()}  # [N, MOST, C]
    cell = torch.stack([at % GRID, at // GRID], -1)  # (x, y)
    centre = ((cell + 0.5 + values["offset"]) * CELL).tolist()
    radius, rgb = (10 * values["radius"][..., 0]).tolist(), values["rgb"].tolist()
    size, colour, shape = (values[name].argmax(-1).tolist() for name in ("size", "colour", "shape"))
    counts, backgrounds = (score > 0.5).sum(1).tolist(), maps.background.argmax(1).tolist()

    def found(i: int, k: int) -> Found:
        names = SIZES[size[i][k]], COLOURS[colour[i][k]], SHAPES[shape[i][k]]
        return Found(*names, *centre[i][k], radius[i][k], tuple(rgb[i][k]))

    return [Reading(BACKGROUNDS[backgrounds[i]], tuple(found(i, k) for k in range(count))) for i, count in enumerate(counts)]


def targets(scenes: list[Scene], drawings: Drawings) -> Targets:
    """What the judge should say of drawings of these scenes (`drawings.images` is not looked at)."""
    n, rows = len(scenes), torch.arange(len(scenes))[:, None, None]
    centre = torch.from_numpy(drawings.position) / CELL - 0.5  # [N, 3, 2] in cells, NaN where there is no object
    cells = torch.stack(torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="xy"), -1)  # (x, y)
    away = centre[:, :, None, None] - cells  # [N, 3, GRID, GRID, 2]
    distance = away.square().sum(-1).nan_to_num(torch.inf)
    square, nearest = distance.min(1)  # [N, GRID, GRID]

    def classes(name: str) -> Tensor:
        table = torch.zeros(n, 3, dtype=torch.long)
        for i, scene in enumerate(scenes):
            for k, thing in enumerate(scene.things):
                table[i, k] = KINDS[name].index(getattr(thing, name))
        return table[rows, nearest]  # [N, GRID, GRID]

    attributes = {
        **{name: classes(name) for name in KINDS},
        "offset": away.take_along_dim(nearest[:, None, ..., None], 1)[:, 0].permute(0, 3, 1, 2),
        "radius": torch.from_numpy(drawings.radius / 10)[rows, nearest][:, None],
        "rgb": torch.from_numpy(drawings.rgb)[rows, nearest].permute(0, 3, 1, 2),
    }
    background = torch.tensor([BACKGROUNDS.index(scene.background) for scene in scenes])
    return Targets(torch.exp(-square / 2)[:, None], attributes, background)


def judge_loss(maps: Maps, wanted: Targets, damage: Tensor) -> Tensor:
    """One number to minimize: heat everywhere, attributes near objects, background and damage of the whole.

    Args:
        damage: [N, 3] the strengths applied, in [0, 1].
    """
    near = wanted.heat * (wanted.heat > 0.3)  # [N, 1, GRID, GRID]
    near = near / near.sum()
    loss = GRID * F.binary_cross_entropy_with_logits(maps.cells["heat"], wanted.heat)
    for name, want in wanted.attributes.items():
        said = maps.cells[name]
        if name in KINDS:
            loss = loss + (near[:, 0] * F.cross_entropy(said, want, reduction="none")).sum()
        else:
            loss = loss + (near * (said - want).abs()).sum()
    return loss + F.cross_entropy(maps.background, wanted.background) + F.mse_loss(maps.damage, damage)
