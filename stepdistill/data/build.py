"""Read what a recipe names, and encode it: text by the pipeline's encoders, pictures by its autoencoder."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import torch

from .. import __version__, distributed
from ..errors import UserError
from ..families.base import Family
from ..files import giga
from ..lora_sources import find_lora, identities
from ..recipe import Recipe
from ..show import Line
from ..sources import embedded_models, identity
from .batches import Batches
from .buckets import Bucket, bucket_sizes
from .cache import Cache, Column, Memory, Store, disk
from .pairs import read_pairs
from .pictures import read_pictures, store_pictures
from .prompts import read_prompts
from .texts import store_texts

FORMAT = 1  # of what is encoded; a change in how raises it


def build_batches(
    recipe: Recipe, family: Family, line: Line | None = None, pairs: Path | None = None, cache: Path | None = None
) -> Batches:
    """Everything encoded, and read as it is needed: text encoders and the autoencoder's encoder are not asked again. Pictures
    are read only if the strategy needs x0.

    pairs: the folder of teacher pairs, for a strategy that needs them; prompts are then those of the pairs.
    cache: the folder where encodings are kept for other runs; None: they stay in memory.

    Raises:
        UserError: pairs are missing, damaged, or of another resolution; no picture is usable; the disk is too small.
    """
    data, train, line = recipe.data, recipe.train, line or Line(io.StringIO())
    dtype, made = getattr(torch, recipe.model.dtype), makers(recipe, family)

    def store(what: str, **more: Any) -> Store:
        return Memory() if cache is None else Cache(cache, what, made | more, line)

    sizes = bucket_sizes(family.size, family.multiple) if data.buckets else [family.size]
    x0 = noise = None
    buckets = ()
    if "pairs" in recipe.strategy.needs:
        prompts, noise, x0 = read_pairs(pairs)
        check_shape(pairs, family, tuple(noise.shape[1:]))
    elif "x0" in recipe.strategy.needs:
        pictures = store("pictures", sizes=sizes, frames=family.frames)
        prompts, x0 = store_pictures(family, sizes, read_pictures(data.images, data.count), pictures, data.images, line)
        buckets = group(x0) if data.buckets else ()
    else:
        prompts = read_prompts(data.prompts, data.count)
        buckets = tuple(Bucket(family.latent_shape(*size), None) for size in sizes) if data.buckets else ()
    cond, null = store_texts(family, prompts, store("texts"), dtype, line)
    if cache is not None:
        line.say(f"encodings are in {cache}, {giga(disk(cache))} with those of other models and sizes")
    return Batches(
        cond=cond,
        null=null,
        prompts=tuple(prompts),
        x0=x0,
        shape=family.shape,
        noise=noise,
        batch=train.batch,
        parts=train.accumulate,
        seed=train.seed,
        rank=distributed.rank(),
        world=distributed.world(),
        device=distributed.device(),
        buckets=buckets,
    )


def group(x0: Column) -> tuple[Bucket, ...]:
    """Rows by the shape of their latents."""
    shapes = [x0.store.shape(key, x0.name) for key in x0.keys]
    return tuple(Bucket(shape, tuple(i for i, s in enumerate(shapes) if s == shape)) for shape in sorted(set(shapes)))


def check_shape(pairs: Path, family: Family, shape: tuple[int, ...]) -> None:
    """Raises UserError for pairs of latents of another shape than the family's."""
    if shape != family.shape:
        height, width = family.size
        raise UserError(
            f"{pairs} holds latents of shape {list(shape)}, but at {height} x {width} pixels they are "
            f"{list(family.shape)}; set data.resolution as when the pairs were made, or make others: "
            f"stepdistill pairs RECIPE --out DIR"
        )


def makers(recipe: Recipe, family: Family) -> dict[str, Any]:
    """All of a model that may decide what its encodings are: plain values."""
    model = recipe.model
    folder = embedded_models().get(model.source, Path(model.source))
    hub = Path(family.pipe.vae.config._name_or_path).parent.name  # the commit
    files = fingerprint(folder) if folder.is_dir() else hub
    loras = [fingerprint(path) for path in (find_lora(lora).path for lora in model.loras) if path]
    about = {"format": FORMAT, "stepdistill": __version__, "pipeline": family.pipeline, "files": files, "loras": loras}
    return about | {"model": dataclasses.asdict(model) | {"source": identity(model.source), "loras": identities(model.loras)}}


def fingerprint(path: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of change of a file, or of all files of a folder; nothing of what is not there."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
