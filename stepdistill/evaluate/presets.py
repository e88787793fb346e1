"""What `stepdistill eval` can measure: the embedded world, named protocols, and the user's own prompts and reference."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch

from .. import perceptual
from ..data.prompts import read_prompts
from ..errors import UserError
from ..foreign import read_json
from ..show import Line
from ..sources import check_prompts, suggestion
from ..tiny.judge import FEATURES as JUDGED
from . import references, tiny
from .clip import CLIPS
from .features import FEATURES, Features, Fitted
from .frechet import needed
from .grid import spread
from .judged import Judged, Spread
from .measure import VARIED, Asked, Suite
from .meters import Cmmd, Colour, Distances, Frechet, Meter, Scores, Shown, Variety
from .references import Reference
from .rewards import REWARDS

DISTANCES: dict[str, Callable[[Features, Reference], Meter]] = {  # by their features; all need a reference
    "inception": Distances,
    "inception-patch": functools.partial(Frechet, prefix="patch_"),
    "clip": functools.partial(Cmmd, prefix="clip_"),
    "judge": Distances,
}
SCORES = {  # word: the figure, and what scores; these need no reference
    "clip-score": ("clip", CLIPS["clip"]),
    "clip-score-dmd2": ("clip", CLIPS["dmd2"]),
    **{word: (word.replace("-", "_"), make) for word, make in REWARDS.items()},
}
FEATURE_WORDS = (*DISTANCES, *SCORES)  # of --features
EACH, SHOWN = 16, 32  # pictures of one prompt; pictures that people see beside the teacher's


@dataclass(frozen=True)
class Preset:
    """A protocol: how many pictures, how large, in which features."""

    n: int | None  # None: as many as there are prompts
    features: tuple[str, ...]  # of FEATURE_WORDS
    side: int | None = None  # of the pictures that must be drawn, in pixels; None: whatever the run draws
    square: int | None = None  # side to which pictures and photographs are brought before distances are taken; None: as drawn
    source: str = ""  # where prompts and photographs come from


CAPTIONS_BYTES = 2**27  # COCO's own are 32 MB
CAPTIONS = "captions_val2014.json, or a text file of one prompt a line"
COCO = (
    "captions_val2014.json, of annotations_trainval2014.zip, and the folder val2014, of val2014.zip, both from "
    "https://cocodataset.org/#download"
)
SCORED = ("inception", "clip-score-dmd2")
PRESETS = {  # as the evaluation of DMD2, arXiv:2405.14867
    "coco30k-sd15": Preset(30_000, SCORED, side=512, square=256, source=COCO),
    "coco10k-sdxl": Preset(10_000, (*SCORED, "inception-patch"), side=1024, square=512, source=COCO),
}
OWN = Preset(None, ("inception", "clip-score"))


def find_preset(name: str) -> Preset:
    """Raises UserError for a name that is none of PRESETS."""
    if name not in PRESETS:
        known = ("tiny", *PRESETS)
        raise UserError(f"--preset {name} is none{suggestion(name, known) or '; there are ' + ', '.join(known)}")
    return PRESETS[name]


def tiny_suite(n: int, captions: int = tiny.DIVERSITY_CAPTIONS, each: int = EACH, shown: int = SHOWN, seed: int = 0) -> Suite:
    """What is measured of a sampler of the embedded world.

    Args:
        n: pictures behind most figures; FD depends on it, so figures compare at equal n only.
        captions, each: of the diversity pictures; 0 captions leave diversity out.
        shown: pictures that are kept as they are.
        seed: of the noise.

    Raises:
        UserError: n is too small for the judge's features.
    """
    if n < needed(JUDGED):
        raise UserError(
            f"{n} pictures are too few for a Frechet distance in {JUDGED} features: give --n (eval.n) {needed(JUDGED)} or more"
        )
    made = tiny.reference()
    meters = (Judged(references.embedded()), Colour(made.colour), Shown(min(shown, n)))
    sets = {"plain": Asked([scene.caption for scene in tiny.prompts(n)], meters)}
    if captions:
        repeated = [scene.caption for scene in tiny.diversity_prompts(captions) for _ in range(each)]
        sets["varied"] = Asked(repeated, (Spread(each, made.variances[:captions]),), VARIED, each)
    return Suite("tiny", sets, decides("64x64", seed))


def suite(
    name: str,
    preset: Preset,
    prompts: Path | None,
    reference: str | None,
    size: tuple[int, int],
    seed: int,
    device: torch.device,
    cache: Path,
    line: Line,
) -> Suite:
    """What is measured by a protocol on prompts of a file, against a reference.

    Args:
        reference: a folder of pictures or a file of statistics; None: no distances are measured.
        size: height and width of the pictures that are drawn.
        cache: where the features of folders are kept.

    Raises:
        UserError: prompts or reference are not given, are too few, or do not fit.
    """
    label = f"preset {name}" if preset.source else "the evaluation"
    if unknown := next((word for word in preset.features if word not in FEATURE_WORDS), None):
        raise UserError(
            f"--features {unknown} is none{suggestion(unknown, FEATURE_WORDS) or '; there are ' + ', '.join(FEATURE_WORDS)}"
        )
    if prompts is None or (preset.source and reference is None):
        where = f": {preset.source}" if preset.source else " of prompts, one a line, and --reference FOLDER for distances"
        raise UserError(f"{label} needs --prompts FILE{' and --reference FOLDER' * bool(preset.source)}{where}")
    if preset.side and size != (preset.side, preset.side):
        raise UserError(
            f"{label} is of {preset.side}x{preset.side} pixels, but this run draws {size[1]}x{size[0]}; set data.resolution "
            f"to {preset.side} in the recipe of a run, or measure it by --prompts and --reference of your own"
        )
    asked = take(read_captions(prompts), preset.n, prompts)
    wanted = [word for word in preset.features if word in DISTANCES and reference is not None]
    scored = {word: SCORES[word][0] for word in preset.features if word in SCORES}
    for pair in combinations([*wanted, *scored], 2):
        if set(pair) == {"inception", "judge"} or scored.get(pair[0], pair[0]) == scored.get(pair[1], pair[1]):
            raise UserError(f"--features {' and '.join(pair)} are told as one figure; leave one out")
    other = [word for word in wanted if word in ("inception-patch", "clip") and str(reference).endswith(".npz")]
    if other:
        raise UserError(
            f"--features {' and '.join(other)}: {reference} holds moments of inception features of whole pictures; give a "
            f"folder of pictures, or leave these out"
        )
    if perceptual.installed():
        perceptual.network(device)  # what it lacks is told before hours of sampling
    networks: dict[str, Features] = {}
    for word in wanted:
        made = FEATURES[word](device)
        if word != "clip" and len(asked) < needed(made.dim):
            raise UserError(
                f"{len(asked)} pictures are too few for a Frechet distance in {made.dim} features of {word}: give at least "
                f"{needed(made.dim)} (--n, --prompts), and 10,000 for figures that others compare with; or --features clip"
            )
        whole = preset.square and word != "inception-patch"  # which looks at pictures and photographs as they are
        networks[word] = Fitted(made, preset.square) if whole else made
    least = max((network.least for network in networks.values()), default=1)
    if min(size) < least:
        raise UserError(
            f"this run draws {size[1]}x{size[0]} pixels, and patch FID compares {least}x{least}; leave out the features "
            "inception-patch"
        )
    meters: list[Meter] = []
    same = None if preset.square else size  # else pictures of any size are brought to one
    for word, network in networks.items():
        found = references.reference(reference, network, same, cache, line, least=least)
        meters.append(DISTANCES[word](network, found))
    for figure, score in (SCORES[word] for word in preset.features if word in SCORES):
        meters.append(Scores(figure, score(device)))
    meters += [Colour(), Shown(min(SHOWN, len(asked)))]
    repeated = [prompt for prompt in spread(asked, 32) for _ in range(EACH)]
    many = (Variety(EACH, next(iter(networks.values()), None), lpips=perceptual.installed(), device=device),)
    sets = {"plain": Asked(asked, tuple(meters)), "varied": Asked(repeated, many, VARIED, EACH)}
    measured = f"{preset.square}x{preset.square}" if preset.square else f"{size[1]}x{size[0]}"
    return Suite(name, sets, decides(f"{size[1]}x{size[0]}", seed) | {"measured": measured})


def decides(size: str, seed: int) -> dict[str, str]:
    return {"size": size, "measured": size, "noise": f"by picture index, seed {seed}"}


def take(prompts: Sequence[str], n: int | None, source: Path) -> list[str]:
    """The first n of them.

    Raises:
        UserError: there are fewer.
    """
    if n is not None and len(prompts) < n:
        raise UserError(f"--n {n} is more than the {len(prompts)} prompts of {source}; give more prompts or a smaller --n")
    return list(prompts[:n])


def read_captions(path: Path) -> list[str]:
    """Prompts of a file: of COCO's annotations the first caption of each picture, by the pictures' numbers; else as a recipe
    reads them.

    Raises:
        UserError: it is not there, cannot be read, or holds none.
    """
    if path.suffix.lower() != ".json":
        if wrong := next(check_prompts(str(path)), None):
            raise UserError(f"--prompts {wrong}")
        return read_prompts(str(path))
    try:
        said = read_json(path, CAPTIONS_BYTES)["annotations"]
        first = {one["image_id"]: one for one in sorted(said, key=lambda one: one["id"], reverse=True)}  # the lowest id last
        found = [str(first[image]["caption"]).strip() for image in sorted(first)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--prompts {path} holds no annotations of COCO ({error}); give {CAPTIONS}") from None
    if not any(found):
        raise UserError(f"--prompts {path} holds no caption; give {CAPTIONS}")
    return [caption for caption in found if caption]
