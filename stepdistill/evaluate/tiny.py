"""The embedded world's evaluation: pictures from a sampler, read by the judge, against drawings.

The reference (10,000 drawings) ships in `stepdistill/tiny/reference.safetensors`, keyed by the judge's weights;
`python -m stepdistill.evaluate` remakes it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..tiny.judge import WEIGHTS, Judge, Reading, judge_key, load_judge, look, read
from ..tiny.world import PIXELS, Scene, draw, scenes
from .frechet import Moments, frechet_interval, moments
from .readings import Alignment, alignment, diversity, variances

REFERENCE = WEIGHTS.with_name("reference.safetensors")
PICTURES, DRAWINGS = 2048, 10_000  # a figure's; the reference's
SEED_PROMPTS, SEED_REFERENCE, SEED_FLOOR, SEED_DIVERSITY = 21, 22, 23, 24  # 11 to 13 are training's and the judge's
DIVERSITY_INDEX = 1_000_000  # index of the first diversity picture's noise
DIVERSITY_CAPTIONS, DIVERSITY_DRAWINGS = 32, 128  # captions that the reference knows, drawings of each

Sample = Callable[[list[str], int], np.ndarray]  # (captions, first index) -> uint8 [N, 64, 64, 3]
Progress = Callable[[int, int], None]  # (pictures done, pictures in all)


class Reference(NamedTuple):
    moments: Moments  # of the features of DRAWINGS drawings
    floor: tuple[float, float, float]  # FD, low, high of PICTURES other drawings
    variances: np.ndarray  # [DIVERSITY_CAPTIONS, 3, 4], of DIVERSITY_DRAWINGS drawings of each diversity caption
    features: np.ndarray  # [PICTURES, FEATURES] float32, of the first drawings: what needs rows, not moments (KID, recall)


@dataclass(frozen=True)
class Result(Alignment):
    """What an evaluation found. Distances are in the judge's features, each of unit spread over drawings."""

    n: int  # pictures behind fd and alignment
    fd: float
    fd_low: float  # 95 % interval; a limit must hold for fd_high
    fd_high: float
    floor: float  # FD of n drawings of the same captions: nothing can be expected below
    diversity: float | None  # 1 is as diverse as drawings; the mean of the three below
    diversity_position: float | None
    diversity_size: float | None
    diversity_shade: float | None

    def to_dict(self) -> dict[str, float | int | None]:
        return asdict(self)


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
                return Reference(against, least, saved["variances"].numpy(), saved["features"].numpy())
    print(f"{REFERENCE} is not of this judge: measuring. To keep: python -m stepdistill.evaluate", file=sys.stderr)
    return measure_reference()


def save_reference(made: Reference) -> None:
    """Write the reference where `reference` looks for it, keyed by the judge's weights."""
    tensors = made.moments._asdict() | {
        "variances": torch.from_numpy(made.variances),
        "floor": torch.tensor(made.floor, dtype=torch.float64),
        "features": torch.from_numpy(made.features),
    }
    save_file(tensors, REFERENCE, {"judge": judge_key()})


def measure_reference() -> Reference:
    """Draw and read everything that `Reference` holds, with a line of progress on stderr."""
    judge, law = load_judge(), scenes(DRAWINGS, SEED_REFERENCE, "all")
    rows = look(judge, draw(law, SEED_REFERENCE).images)[0]
    against = moments(rows)
    spread = []
    for c, scene in enumerate(diversity_prompts(), start=1):
        print(f"\rdrawings of diversity caption {c}/{DIVERSITY_CAPTIONS}", end="", file=sys.stderr, flush=True)
        drawn = draw([scene] * DIVERSITY_DRAWINGS, SEED_DIVERSITY + 1000 * c).images
        spread.append(variances(scene, read(judge, drawn)))
    print(file=sys.stderr)
    return Reference(against, _floor(PICTURES, judge, against), np.array(spread), rows[:PICTURES].astype(np.float32))


def _floor(n: int, judge: Judge, against: Moments) -> tuple[float, float, float]:
    return frechet_interval(look(judge, draw(prompts(n), SEED_FLOOR).images)[0], against)


def evaluate_tiny(
    sample: Sample,
    n: int = PICTURES,
    diversity_captions: int = DIVERSITY_CAPTIONS,
    diversity_images: int = 16,
    progress: Progress | None = None,
    batch: int = 128,
) -> Result:
    """Sample, read and measure.

    Args:
        sample: called with at most `batch` captions and the index of the first; a picture's noise must depend on its
            index alone. Indices run over [0, n), and from DIVERSITY_INDEX up for the diversity pictures.
        n: pictures, at least 2; FD depends on it, so figures compare at equal n only.
        diversity_captions: 0 to 32; 0 leaves diversity out.

    Raises:
        ValueError: a number out of range, or the sampler's pictures are not uint8 [N, 64, 64, 3].
    """
    if n < 2 or diversity_images < 2:
        raise ValueError(f"n is {n} and diversity_images {diversity_images}; both must be at least 2")
    judge, against = load_judge(), reference()
    plain, varied = prompts(n), diversity_prompts(diversity_captions)
    repeated = [scene for scene in varied for _ in range(diversity_images)]
    total, done = n + len(repeated), 0
    rows: list[np.ndarray] = []
    readings: list[Reading] = []
    for asked, first in ((plain, 0), (repeated, DIVERSITY_INDEX)):
        for i in range(0, len(asked), batch):
            captions = [scene.caption for scene in asked[i : i + batch]]
            images = _checked(sample(captions, first + i), len(captions))
            row, said = look(judge, images)
            rows.append(row), readings.extend(said)
            done += len(captions)
            if progress:
                progress(done, total)
    fd, low, high = frechet_interval(np.concatenate(rows)[:n], against.moments)
    groups = [readings[i : i + diversity_images] for i in range(n, total, diversity_images)]
    spread = diversity(varied, groups, against.variances[:diversity_captions])
    return Result(
        **asdict(alignment(plain, readings[:n])),
        n=n,
        fd=fd,
        fd_low=low,
        fd_high=high,
        floor=floor(n)[0],
        diversity=spread.mean,
        diversity_position=spread.position,
        diversity_size=spread.size,
        diversity_shade=spread.shade,
    )


def _checked(images: np.ndarray, n: int) -> np.ndarray:
    wanted = (n, PIXELS, PIXELS, 3)
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape != wanted:
        got = f"{images.dtype} {list(images.shape)}" if isinstance(images, np.ndarray) else type(images).__name__
        raise ValueError(f"the sampler returned {got} for {n} captions; return a uint8 array {list(wanted)}")
    return images
