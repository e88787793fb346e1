"""The features that pictures are compared with: of a folder of pictures, saved and read again, or of the embedded world.

A folder's features are kept in a cache, under a hash of the pictures' bytes, the network and the resizing. The hash reads every
file once, at 230 MB/s on two busy cores: half a minute for 40,000 photographs (6 GB). Computing features is not resumed. With
several processes let the first one ask; the others then find them in the cache.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import UserError
from ..show import Line
from ..sources import EMBEDDED_DATA, PICTURES
from ..tiny.judge import judge_key
from . import tiny
from .features import Features
from .frechet import Moments, moments

THREADS, BATCH = 4, 64
FORMAT = "stepdistill reference 1"
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
) -> Reference:
    """The reference of a source, computed only if it is new.

    Args:
        source: a folder of pictures (all within, by name), a .safetensors that `save_reference` wrote, an .npz with mu and
            sigma (of clean-fid or pytorch-fid), or `stepdistill/tiny`.
        resolution: height and width that every picture must have; None: any, each is resized by itself.
        count: pictures that there must be; None: any number, at least 2.

    Raises:
        UserError: nothing usable is there, a picture is damaged, or it differs from what is asked.
    """
    path = Path(source)
    if str(source) == EMBEDDED_DATA:
        made = embedded()
        _agree(made.about, features, resolution, count, source)
    elif path.is_dir():
        made = of_folder(path, features, resolution, cache, line, count)
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
    folder: Path, features: Features, resolution: tuple[int, int] | None, cache: Path, line: Line, count: int | None = None
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
        for file in files:
            if resolution is not None and file.size != tuple(resolution):
                raise UserError(
                    f"{file.path} has {_size(file.size)} pixels, but the reference must have {_size(resolution)}; "
                    "resize all of them by one rule, or ask for another resolution"
                )
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
        if kept.is_file():
            line.say(f"reference: the features of {folder} are known, in {kept}")
            return load_reference(kept)._replace(about=about)
        rows, waiting = [], []
        for done, picture in enumerate(ahead(pool, opened, paths, 2 * BATCH), 1):
            waiting.append(picture)
            if len(waiting) == BATCH or done == len(paths):
                rows.append(features(waiting))
                waiting = []
                line.report(f"features of {folder}", done, len(paths))
    table = np.concatenate(rows)
    made = Reference(table, moments(table), about)
    save_reference(made, kept)
    return made


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
    part = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(tensors, part, {"format": FORMAT, "about": json.dumps(made.about)})
    part.replace(path)


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
