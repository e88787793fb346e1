"""The first pictures of whoever is measured, as files for people: the same index is the same prompt and the same noise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..files import write_text

KEY = "key.txt"  # beside the pictures: changes with whatever they depend on


def save(folder: Path, pictures: np.ndarray, key: str) -> None:
    """uint8 [N, H, W, 3] as folder/00000.png and so on, in place of what was there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for k, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{k:05d}.png")
    write_text(folder / KEY, key)  # last: without it the pictures are nobody's


def load(folder: Path, n: int, key: str) -> np.ndarray | None:
    """The first n pictures of that key, uint8 [n, H, W, 3]; None if they are not there."""
    files = [folder / f"{k:05d}.png" for k in range(n)]
    if not (folder / KEY).is_file() or (folder / KEY).read_text() != key or not all(file.is_file() for file in files):
        return None
    return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])


def save_prompts(folder: Path, prompts: Sequence[str], seed: int) -> None:
    """The prompt of each index, in folder/prompts.json, and the seed of the noise, in seed.json; pictures of others are
    removed."""
    wanted = {"prompts.json": json.dumps(list(prompts), indent=1, ensure_ascii=False), "seed.json": json.dumps(seed)}
    there = {name: (folder / name).read_text(encoding="utf-8") for name in wanted if (folder / name).is_file()}
    if there and there != wanted:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in wanted.items():
        write_text(folder / name, text)
