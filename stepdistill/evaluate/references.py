"""The features that pictures are compared with: of a folder of pictures, saved and read again, or of the embedded world.

A folder's features are kept in a cache, under a hash of the pictures' bytes, the network and the resizing. The hash reads every
file once, at 230 MB/s on two busy cores: half a minute for 40,000 photographs (6 GB). Several processes ask together: each
computes its share of the features, in blocks that an interruption leaves there.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .. import distributed
from ..errors import UserError
from ..files import beside
from ..show import Line
from ..sources import EMBEDDED_DATA, PICTURES
from ..tiny.judge import judge_key
from . import tiny
from .features import Features
from .frechet import Moments, moments
from .rows import Rows, blocks, fill, gather, share

THREADS, BATCH = 4, 64
FORMAT = "stepdistill reference 1"
NAMED = 10  # pictures that an error names at most
UNKNOWN = "unknown (a file of moments does not say)"
DAMAGED = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises on a bad picture

A, B = TypeVar("A"), TypeVar("B")


class Reference(NamedTuple):
    """What pictures are compared with."""

    features: np.ndarray | None  # [M, D] float32; None: only moments are known, so only the Frechet distance can be computed
    moments: Moments
    about: dict[str, Any]  # features, filter, resolution, n, hash, source: goes into provenance


class Sized(NamedTuple):
    """A picture file that was looked at."""

    path: Path
    digest: str
    size: tuple[int, int]  # height, width


def reference(
    source: str | Path,
    features: Features,
    resolution: tuple[int, int] | None,
    cache: Path,
    line: Line,
    count: int | None = None,
    least: int = 1,
) -> Reference:
    """The reference of a source, computed only if it is new; all processes ask at the same point.

    Args:
        source: a folder of pictures (all within, by name), a .safetensors that `save_reference` wrote, an .npz with mu and
            sigma (of clean-fid or pytorch-fid), or `stepdistill/tiny`.
        resolution: height and width that every picture must have; None: any, each is resized by itself.
        count: pictures that there must be; None: any number, at least 2.
        least: pixels that the shorter edge of every picture of a folder must have.

    Raises:
        UserError: nothing usable is there, a picture is damaged, or it differs from what is asked.
    """
    path = Path(source)
    if str(source) == EMBEDDED_DATA:
        made = embedded()
        _agree(made.about, features, resolution, count, source)
    elif path.is_dir():
        made = of_folder(path, features, resolution, cache, line, count, least)
    elif path.suffix == ".safetensors" and path.is_file():
        made = load_reference(path)
        _agree(made.about, features, resolution, count, source)
    elif path.suffix == ".npz" and path.is_file():
        made = of_moments(path, features)
        line.say(f"warning: {source} does not say how its features were made; taken for {features.name}, {features.filter}")
    else:
        raise UserError(
            f"the reference {source} is no folder of pictures, .safetensors or .npz (seen from {Path.cwd()}); "
            f"give one of these, or {EMBEDDED_DATA}"
        )
    return made


def embedded() -> Reference:
    """The drawings of the embedded world: moments of 10,000, features of the first 2,048."""
    made = tiny.reference()
    about = {"features": f"embedded judge {judge_key()[:8]}", "filter": "none", "resolution": "64x64", "n": tiny.DRAWINGS}
    return Reference(made.features, made.moments, about | {"hash": tiny.reference_key(), "source": EMBEDDED_DATA})


def of_folder(
    folder: Path,
    features: Features,
    resolution: tuple[int, int] | None,
    cache: Path,
    line: Line,
    count: int | None = None,
    least: int = 1,
) -> Reference:
    """Features of all pictures of a folder, from the cache if they are there."""
    paths = sorted((path for path in folder.rglob("*") if path.suffix.lower() in PICTURES), key=lambda path: path.as_posix())
    if len(paths) < 2:
        have = ", ".join(sorted(PICTURES))
        raise UserError(
            f"the reference {folder} holds {len(paths)} pictures ({have}); at least 2 are needed, and thousands help"
        )
    if count is not None and len(paths) != count:
        raise UserError(f"the reference {folder} holds {len(paths)} pictures, not the {count} asked for; add or take away some")
    with ThreadPoolExecutor(THREADS) as pool:
        files: list[Sized] = []
        for file in ahead(pool, look, paths):
            files.append(file)
            line.report(f"looking through {folder}", len(files), len(paths))
    check_sizes(files, folder, resolution, least)
    sizes = {file.size for file in files}
    digest = _digest(*(f"{file.path.relative_to(folder).as_posix()} {file.digest}" for file in files))
    about = {
        "features": features.name,
        "filter": features.filter,
        "resolution": _size(files[0].size) if len(sizes) == 1 else "mixed",
        "n": len(files),
        "hash": digest,
        "source": str(folder),
    }
    kept = cache / f"{_digest(digest, features.name, features.filter)[:20]}.safetensors"
    if distributed.told(kept.is_file()):  # asked before any process writes it
        line.say(f"reference: the features of {folder} are known, in {kept}")
    else:
        compute(features, files, about, kept, line)
    return load_reference(kept)._replace(about=about)


def check_sizes(files: Sequence[Sized], folder: Path, resolution: tuple[int, int] | None, least: int) -> None:
    """Raises UserError that says how many pictures, and which, are not of a resolution, or have an edge below `least`."""

    def named(some: Sequence[Sized]) -> str:
        first = ", ".join(f"{file.path.relative_to(folder)} {_size(file.size)}" for file in some[:NAMED])
        more = f" and {len(some) - NAMED} more" * (len(some) > NAMED)
        return f"of the {len(files)} pictures of the reference {folder} {len(some)} ({first}{more})"

    if other := [file for file in files if resolution is not None and file.size != tuple(resolution)]:
        remedy = "resize all of them by one rule, or ask for another resolution"
        raise UserError(f"{named(other)} do not have the {_size(resolution)} pixels that each must have; {remedy}")
    if small := [file for file in files if min(file.size) < least]:
        remedy = "take these away, or leave out the features inception-patch"
        raise UserError(f"{named(small)} have an edge below the {least} pixels that patch FID compares; {remedy}")


def compute(features: Features, files: Sequence[Sized], about: dict[str, Any], kept: Path, line: Line) -> None:
    """Write the features of pictures to `kept`: each process computes its share in blocks, and the first one joins them."""
    spans, parts, done = blocks(len(files)), kept.with_suffix(".parts"), 0
    mine = sum(map(len, share(spans)))
    with ThreadPoolExecutor(THREADS) as pool:

        def block(span: range) -> Rows:
            coming = ahead(pool, opened, [files[k].path for k in span], 2 * BATCH)
            rows = [features(list(islice(coming, BATCH))) for _ in range(0, len(span), BATCH)]
            return {"features": np.concatenate(rows)}

        for made in fill(parts, spans, block):
            done += made
            line.report(f"features of {about['source']}", done, mine)
    distributed.wait()
    if distributed.rank() == 0:
        table = gather(parts, spans)["features"]
        save_reference(Reference(table, moments(table), about), kept)
        shutil.rmtree(parts)
    distributed.wait()


def ahead(pool: Executor, work: Callable[[A], B], items: Iterable[A], most: int = 2 * THREADS) -> Iterator[B]:
    """work(item) of each item in order; at most `most` are under way or waiting, so memory does not grow."""
    waiting = []
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) > most:
            yield waiting.pop(0).result()
    while waiting:
        yield waiting.pop(0).result()


def look(path: Path) -> Sized:
    """Hash and size of a picture; its pixels are not decoded yet."""
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as picture:
            return Sized(path, hashlib.sha256(content).hexdigest(), (picture.height, picture.width))
    except DAMAGED as error:
        raise damaged(path, error) from error


def opened(path: Path) -> np.ndarray:
    """uint8 [H, W, 3] of a picture file; grey and palettes become RGB, transparency is dropped.

    Raises:
        UserError: the picture is damaged.
    """
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except DAMAGED as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: BaseException) -> UserError:
    return UserError(f"{path} is no picture that can be read ({error}); mend it or take it away")


def save_reference(made: Reference, path: Path) -> None:
    """Write features, moments and what they are of to a .safetensors, whole or not at all."""
    tensors = {"mean": made.moments.mean, "cov": made.moments.cov}
    if made.features is not None:
        tensors["features"] = torch.from_numpy(np.ascontiguousarray(made.features))
    path.parent.mkdir(parents=True, exist_ok=True)
    with beside(path) as tmp:
        save_file(tensors, tmp, {"format": FORMAT, "about": json.dumps(made.about)})


def load_reference(path: Path) -> Reference:
    """What `save_reference` wrote.

    Raises:
        UserError: the file is damaged, or another kind of file.
    """
    try:
        with safe_open(path, "pt") as file:
            meta = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
        if meta.get("format") != FORMAT:
            raise ValueError(f"its format is {meta.get('format')!r}, not {FORMAT!r}")
        rows = tensors["features"].numpy() if "features" in tensors else None
        return Reference(rows, Moments(tensors["mean"], tensors["cov"]), json.loads(meta["about"]))
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} is no reference of stepdistill ({error}); delete it and give the folder of pictures"
        ) from error


def of_moments(path: Path, features: Features) -> Reference:
    """An .npz with mu [D] and sigma [D, D], as clean-fid and pytorch-fid write them; how it was resized stays unknown."""
    try:
        with np.load(path, allow_pickle=False) as file:
            mean, cov = (torch.from_numpy(np.asarray(file[name], np.float64)) for name in ("mu", "sigma"))
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise UserError(f"{path} holds no moments mu and sigma ({error}); give the folder of pictures instead") from error
    if mean.shape != (features.dim,) or cov.shape != (features.dim, features.dim):
        raise UserError(
            f"{path} holds moments of {list(mean.shape)} and {list(cov.shape)} features, but {features.name} has "
            f"{features.dim}; give those of this network, or the folder of pictures"
        )
    about = dict.fromkeys(("features", "filter", "resolution"), UNKNOWN) | {"n": None}
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Reference(None, Moments(mean, cov), about | {"hash": digest, "source": str(path)})


def _agree(
    about: dict[str, Any], features: Features, resolution: tuple[int, int] | None, count: int | None, source: str | Path
) -> None:
    """Raises UserError naming the fields in which a saved reference is not what is asked."""
    asked = {"features": features.name, "filter": features.filter}
    asked |= {} if resolution is None else {"resolution": _size(resolution)}
    asked |= {} if count is None else {"n": count}
    if other := [f"{name} is {about.get(name)!r}, not {want!r}" for name, want in asked.items() if about.get(name) != want]:
        raise UserError(f"the reference {source} differs: {'; '.join(other)}; make it anew from its folder of pictures")


def _size(size: tuple[int, int]) -> str:
    """Height and width as people say it: WIDTHxHEIGHT."""
    return f"{size[1]}x{size[0]}"


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
