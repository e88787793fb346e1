"""Pictures with captions, of whatever kind of source, through a pipeline's autoencoder; what cannot be used is listed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from PIL import ImageOps

from .. import distributed
from ..errors import UserError
from ..families.base import Family
from ..fields import unfit
from ..show import Line
from ..sources import EMBEDDED_DATA
from .buckets import Size, nearest
from .cache import Cache, Column, Entry, Store, fill
from .drawings import drawings
from .folder import folder_pictures
from .picture import Picture, Skipped, fit
from .shards import shard_pictures
from .tables import table_pictures

AREA, MOST = 8 * 512 * 512, 64  # pixels encoded at a time, and pictures
LATENTS, SKIPPED = "latents", "skipped.txt"
KINDS: tuple[Callable[[Path], Iterator[Picture | Skipped]], ...] = (folder_pictures, shard_pictures, table_pictures)


def read_pictures(source: str, count: int | None = None) -> Iterator[Picture | Skipped]:
    """Pictures of a source, at most `count` (None: all of a folder), and what had to be left out; none is opened yet."""
    if source == EMBEDDED_DATA:
        return drawings(count)
    return islice(map(captioned, chain.from_iterable(kind(Path(source)) for kind in KINDS)), count)


def captioned(one: Picture | Skipped) -> Picture | Skipped:
    """The same, unless its caption is too long, or holds what is no text."""
    fault = unfit(one.caption, place=False) if isinstance(one, Picture) else None
    return Skipped(one.name, f"has a caption that {fault}") if fault else one


def store_pictures(
    family: Family, sizes: list[Size], found: Iterable[Picture | Skipped], store: Store, source: str, line: Line
) -> tuple[list[str], Column]:
    """Captions, and latents [N, ...] by way of a store, of all pictures that can be read. What is left out is told.

    sizes: each picture is fitted to the one of nearest aspect ratio.

    Raises:
        UserError: nothing is left.
    """
    found = list(found)
    pictures = {one.key: one for one in found if isinstance(one, Picture)}
    skipped = [one for one in found if isinstance(one, Skipped)]
    area = max(height * width for height, width in sizes)

    def encode(keys: list[str]) -> dict[str, Entry]:
        pixels = {key: image for key in keys if (image := read(pictures[key], sizes)) is not None}
        made = {}
        for shape in {image.shape for image in pixels.values()}:
            made |= encode_pictures(family, {key: image for key, image in pixels.items() if image.shape == shape})
        return made

    fill(store, list(pictures), encode, max(1, min(MOST, AREA // area)), "pictures encoded", line)
    skipped += [Skipped(one.name, damage(one)) for one in pictures.values() if one.key not in store]
    kept = [one for one in found if isinstance(one, Picture) and one.key in store]
    tell(skipped, len(kept) + len(skipped), store, source, line)
    return [one.caption for one in kept], Column(store, [one.key for one in kept], LATENTS)


def read(picture: Picture, sizes: list[Size]) -> np.ndarray | None:
    """A picture, turned as its camera was held, fitted to uint8 [height, width, 3]; None if it is damaged."""
    try:
        image = ImageOps.exif_transpose(picture.load()).convert("RGB")
    except Exception:  # decoders raise all sorts; `damage` tells which
        return None
    return fit(image, nearest(*image.size, sizes))


def damage(picture: Picture) -> str:
    """Why a picture cannot be read."""
    try:
        ImageOps.exif_transpose(picture.load()).convert("RGB")
    except Exception as error:
        return f"is damaged ({error or type(error).__name__})"
    return "could not be read"


@torch.no_grad()
def encode_pictures(family: Family, pictures: dict[str, np.ndarray]) -> dict[str, Entry]:
    """The latents of pictures of one size, by their keys, on the CPU."""
    pixels = torch.from_numpy(np.stack(list(pictures.values()))).permute(0, 3, 1, 2).float() / 127.5 - 1
    latents = family.encode(pixels).cpu()
    return {key: {LATENTS: x.clone()} for key, x in zip(pictures, latents, strict=True)}


def tell(skipped: list[Skipped], of: int, store: Store, source: str, line: Line) -> None:
    """List what was left out beside the cache, and say so in one line.

    Raises:
        UserError: nothing is left.
    """
    first = f"the first: {skipped[0].name} {skipped[0].reason}" if skipped else f"{source} is empty"
    if len(skipped) == of:
        raise UserError(f"{source}: none of its {of} pictures can be used; {first}; give others in data.images")
    if isinstance(store, Cache) and distributed.rank() == 0:
        (store.folder / SKIPPED).write_text("".join(f"{one.name}: {one.reason}\n" for one in skipped), encoding="utf-8")
    if skipped:
        where = f"; all are in {store.folder / SKIPPED}" if isinstance(store, Cache) else ""
        line.say(f"{len(skipped)} of {of} pictures of {source} are left out; {first}{where}")
