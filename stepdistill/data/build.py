"""Read what a recipe names, and encode it: text by the pipeline's encoders, pictures by its autoencoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import distributed
from ..errors import UserError
from ..families.base import Family
from ..recipe import Recipe
from ..sources import EMBEDDED_DATA, PICTURES
from ..tiny.world import draw, scenes
from .batches import Batches
from .pairs import read_pairs
from .prompts import TINY_COUNT, TINY_SEED, read_prompts

Report = Callable[[str, int, int], None]  # what, done, of how many


def quiet(what: str, done: int, of: int) -> None:
    """A Report that tells nobody."""


def build_batches(recipe: Recipe, family: Family, report: Report = quiet, pairs: Path | None = None) -> Batches:
    """Everything encoded, in memory on the CPU. Pictures are read only if the strategy needs x0.

    pairs: the folder of teacher pairs, for a strategy that needs them; prompts are then those of the pairs.

    Raises:
        UserError: pairs are missing, damaged, or of another resolution.
    """
    data, train = recipe.data, recipe.train
    shape = family.shape
    x0 = noise = None
    if "pairs" in recipe.strategy.needs:
        prompts, noise, x0 = read_pairs(pairs)
        if noise.shape[1:] != shape:
            height, width = family.size
            raise UserError(
                f"{pairs} holds latents of shape {list(noise.shape[1:])}, but at {height} x {width} pixels they are "
                f"{list(shape)}; set data.resolution as when the pairs were made, or make others: "
                f"stepdistill pairs RECIPE --out DIR"
            )
    elif "x0" in recipe.strategy.needs:
        prompts, pictures = captioned(data.images, data.count, family.size)
        x0 = encode_pictures(family, pictures, len(prompts), report)
    else:
        prompts = read_prompts(data.prompts, data.count)
    return Batches(
        cond=encode_texts(family, prompts, report),
        null=family.null_prompts(),
        prompts=tuple(prompts),
        x0=x0,
        shape=shape,
        noise=noise,
        batch=train.batch,
        parts=train.accumulate,
        seed=train.seed,
        rank=distributed.rank(),
        world=distributed.world(),
        device=distributed.device(),
    )


def captioned(source: str, count: int | None, size: tuple[int, int]) -> tuple[list[str], Iterator[np.ndarray]]:
    """Captions, and lazily, in chunks, their pictures uint8 [n, height, width, 3]."""
    if source == EMBEDDED_DATA:
        told = scenes(count or TINY_COUNT, TINY_SEED, "seen")
        chunks = (draw(told[i : i + 64], TINY_SEED * 1_000_000 + i).images for i in range(0, len(told), 64))
        fitted = (np.stack([fit(Image.fromarray(image), size) for image in images]) for images in chunks)
        return [scene.caption for scene in told], fitted
    paths = sorted(p for p in Path(source).rglob("*") if p.suffix.lower() in PICTURES)[:count]
    captions = [path.with_suffix(".txt").read_text(encoding="utf-8").strip() for path in paths]
    return captions, (np.stack([read_picture(path, size) for path in paths[i : i + 8]]) for i in range(0, len(paths), 8))


def read_picture(path: Path, size: tuple[int, int]) -> np.ndarray:
    """A picture of a file, fitted."""
    with Image.open(path) as picture:
        return fit(picture.convert("RGB"), size)


def fit(picture: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """uint8 [height, width, 3]: resized (Lanczos) until it just covers that size, then the centre."""
    height, width = size
    scale = max(width / picture.width, height / picture.height)
    wide, high = max(width, round(picture.width * scale)), max(height, round(picture.height * scale))
    left, top = (wide - width) // 2, (high - height) // 2
    resized = picture if picture.size == (wide, high) else picture.resize((wide, high), Image.LANCZOS)
    return np.asarray(resized.crop((left, top, left + width, top + height)))


@torch.no_grad()
def encode_pictures(family: Family, pictures: Iterator[np.ndarray], total: int, report: Report) -> Tensor:
    """Latents [N, ...] of uint8 pictures."""
    latents, done = [], 0
    for chunk in pictures:
        pixels = torch.from_numpy(chunk).permute(0, 3, 1, 2).float() / 127.5 - 1
        latents.append(family.encode(pixels).cpu())
        done += len(chunk)
        report("pictures encoded", done, total)
    return torch.cat(latents)


def encode_texts(family: Family, prompts: list[str], report: Report = quiet, chunk: int = 64) -> dict[str, Tensor]:
    """What the network needs of each prompt, [N, ...], on the CPU; equal prompts are encoded once."""
    unique = list(dict.fromkeys(prompts))
    parts = []
    for i in range(0, len(unique), chunk):
        parts.append({name: x.cpu() for name, x in family.encode_prompts(unique[i : i + chunk]).items()})
        report("prompts encoded", min(i + chunk, len(unique)), len(unique))
    place = {prompt: i for i, prompt in enumerate(unique)}
    rows = torch.tensor([place[prompt] for prompt in prompts])
    return {name: torch.cat([part[name] for part in parts])[rows] for name in parts[0]}
