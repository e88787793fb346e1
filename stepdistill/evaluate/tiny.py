"""The embedded world's evaluation: its prompts, and the drawings that pictures of them are compared with.

The reference (10,000 drawings) ships in `stepdistill/tiny/reference.safetensors`, keyed by the judge's weights;
`python -m stepdistill.evaluate` remakes it.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..tiny.judge import WEIGHTS, Judge, judge_key, load_judge, look, read
from ..tiny.world import Scene, draw, scenes
from .colour import colour
from .frechet import Moments, frechet_interval, moments
from .readings import variances

REFERENCE = WEIGHTS.with_name("reference.safetensors")
PICTURES, DRAWINGS = 2048, 10_000  # a figure's; the reference's
SEED_PROMPTS, SEED_REFERENCE, SEED_FLOOR, SEED_DIVERSITY = 21, 22, 23, 24  # 11 to 13 are training's and the judge's
DIVERSITY_CAPTIONS, DIVERSITY_DRAWINGS = 32, 128  # captions that the reference knows, drawings of each


class Reference(NamedTuple):
    moments: Moments  # of the features of DRAWINGS drawings
    floor: tuple[float, float, float]  # FD, low, high of PICTURES other drawings
    variances: np.ndarray  # [DIVERSITY_CAPTIONS, 3, 4], of DIVERSITY_DRAWINGS drawings of each diversity caption
    colour: np.ndarray  # [3] means of COLOURS over the first PICTURES drawings
    features: np.ndarray  # [PICTURES, FEATURES] float32, of the first drawings: what needs rows, not moments (KID, recall)


def prompts(n: int = PICTURES) -> list[Scene]:
    """The scenes whose captions are evaluated: the reference's caption law, held-out combinations included."""
    return scenes(n, SEED_PROMPTS, "all")


def diversity_prompts(n: int = DIVERSITY_CAPTIONS) -> list[Scene]:
    """n scenes, one and two objects in turn.

    Raises:
        ValueError: n is above the number of captions whose drawings the reference has measured.
    """
    if not 0 <= n <= DIVERSITY_CAPTIONS:
        raise ValueError(f"{n} diversity captions; the reference knows 0 to {DIVERSITY_CAPTIONS}: ask for as many")
    pool = scenes(8 * DIVERSITY_CAPTIONS, SEED_DIVERSITY)
    one, two = ([scene for scene in pool if len(scene.things) == count] for count in (1, 2))
    return [scene for pair in zip(one, two, strict=False) for scene in pair][:n]


def floor(n: int = PICTURES) -> tuple[float, float, float]:
    """FD (with its interval) of drawings of the first n prompts: what a perfect sampler would get."""
    return reference().floor if n == PICTURES else _floor(n, load_judge(), reference().moments)


@functools.cache
def reference() -> Reference:
    """The shipped reference; if it is missing or another judge's, measured anew in about a minute."""
    key = judge_key()
    if REFERENCE.exists():
        with safe_open(REFERENCE, "pt") as file:
            if (file.metadata() or {}).get("judge") == key:
                saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
                against, least = Moments(saved["mean"], saved["cov"]), tuple(saved["floor"].tolist())
                return Reference(against, least, *(saved[name].numpy() for name in ("variances", "colour", "features")))
    print(f"{REFERENCE} is not of this judge: measuring. To keep: python -m stepdistill.evaluate", file=sys.stderr)
    return measure_reference()


@functools.cache
def reference_key() -> str:
    """Changes with the judge and with the drawings that pictures are compared with: sha256 of the judge's and of all values."""
    made, seen = reference(), hashlib.sha256(judge_key().encode())
    for x in (*made.moments, made.variances, made.colour, made.features):
        seen.update(np.ascontiguousarray(x).data)
    return seen.hexdigest()


def save_reference(made: Reference) -> None:
    """Write the reference where `reference` looks for it, keyed by the judge's weights."""
    tensors = made.moments._asdict() | {
        "variances": torch.from_numpy(made.variances),
        "floor": torch.tensor(made.floor, dtype=torch.float64),
        "colour": torch.from_numpy(made.colour),
        "features": torch.from_numpy(made.features),
    }
    save_file(tensors, REFERENCE, {"judge": judge_key()})


def measure_reference() -> Reference:
    """Draw and read everything that `Reference` holds, with a line of progress on stderr."""
    judge, law = load_judge(), scenes(DRAWINGS, SEED_REFERENCE, "all")
    drawings = draw(law, SEED_REFERENCE).images
    rows = look(judge, drawings)[0]
    against = moments(rows)
    spread = []
    for c, scene in enumerate(diversity_prompts(), start=1):
        print(f"\rdrawings of diversity caption {c}/{DIVERSITY_CAPTIONS}", end="", file=sys.stderr, flush=True)
        drawn = draw([scene] * DIVERSITY_DRAWINGS, SEED_DIVERSITY + 1000 * c).images
        spread.append(variances(scene, read(judge, drawn)))
    print(file=sys.stderr)
    least, first = _floor(PICTURES, judge, against), rows[:PICTURES].astype(np.float32)
    return Reference(against, least, np.array(spread), colour(drawings[:PICTURES]).mean(0, dtype=np.float64), first)


def _floor(n: int, judge: Judge, against: Moments) -> tuple[float, float, float]:
    return frechet_interval(look(judge, draw(prompts(n), SEED_FLOOR).images)[0], against)
