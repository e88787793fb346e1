"""Teacher pairs on disk: a manifest, and shards of noise, x0, seeds and prompts, each of which is complete or absent."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UserError
from ..files import beside, write_text
from ..foreign import parse_json, read_json, shaped
from ..sources import PAIRS, shards

FORMAT = 1  # of manifest and shards; a change that old code cannot read raises it


def noise_of(seed: int, shape: Sequence[int]) -> Tensor:
    """The noise of one pair [...], from its seed alone."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def begin(folder: Path, settings: dict[str, Any]) -> None:
    """Write the manifest of a new folder. An old one must have the same settings (count, shard, and what else decides).

    Raises:
        UserError: they differ.
    """
    settings = {"format": FORMAT} | settings
    if (folder / PAIRS).is_file():
        old = manifest(folder)
        keys = [key for key in {**settings, **old} if settings.get(key) != old.get(key)]
        if keys:
            told = ", ".join(f"{key} was {old.get(key)} and is now {settings.get(key)}" for key in keys)
            raise UserError(f"{folder} has pairs of other settings: {told}; set them back, or name another folder")
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / PAIRS, json.dumps(settings, indent=1))


def manifest(folder: Path) -> dict[str, Any]:
    """The settings with which a folder's pairs are made.

    Raises:
        UserError: it has none, or they cannot be read.
    """
    try:
        return dict(read_json(folder / PAIRS))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder}/{PAIRS} cannot be read ({error}); make the pairs in another folder") from None


def write_shard(path: Path, prompts: list[str], noise: Tensor, x0: Tensor, seeds: list[int]) -> None:
    """One shard: n prompts, noise and x0 [n, ...], n seeds; written beside, synced, and renamed."""
    tensors = {"noise": noise, "x0": x0, "seed": torch.tensor(seeds)}
    with beside(path) as tmp:
        save_file({name: x.cpu().contiguous() for name, x in tensors.items()}, tmp, {"prompts": json.dumps(prompts)})


def read_pairs(folder: Path) -> tuple[list[str], Tensor, Tensor]:
    """Prompts, noise and x0 [N, ...] of a complete folder, in memory.

    Raises:
        UserError: a shard is missing or damaged, or they were written by another version.
    """
    made = manifest(folder)
    if made.get("format") != FORMAT:
        raise UserError(f"{folder} was written by another version of stepdistill; make the pairs in another folder")
    try:
        names = shards(made)
    except (KeyError, ValueError) as error:
        raise UserError(f"{folder}/{PAIRS} cannot be read ({error}); make the pairs in another folder") from None
    parts = [read_shard(folder / name) for name in names]
    prompts, noise, x0 = zip(*parts, strict=True)
    prompts = [prompt for some in prompts for prompt in some]
    if not len(prompts) == sum(map(len, noise)) == sum(map(len, x0)) == made["count"]:
        raise UserError(f"{folder} holds {len(prompts)} pairs, not {made['count']}; make them in another folder")
    return prompts, torch.cat(noise), torch.cat(x0)


def read_shard(path: Path) -> tuple[list[str], Tensor, Tensor]:
    """Prompts, noise and x0 [n, ...] of one shard.

    Raises:
        UserError: it is missing or damaged.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing; the command that made the other pairs makes it: stepdistill pairs RECIPE")
    try:
        with safe_open(path, "pt") as file:
            prompts = shaped(parse_json(file.metadata()["prompts"]), tuple[str, ...], "prompts")
            return list(prompts), file.get_tensor("noise"), file.get_tensor("x0")
    except (SafetensorError, TypeError, KeyError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it, and make it again: stepdistill pairs RECIPE") from None
