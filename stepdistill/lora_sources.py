"""How a LoRA is named: a file, a folder, an export, or a hub id, with @0.8 after it where less than all of it is meant."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .sources import PICKLED, is_hub_id

NAME = "pytorch_lora_weights.safetensors"  # what load_lora_weights(folder) looks for


@dataclass(frozen=True)
class LoraSource:
    """What pipe.load_lora_weights(place, weight_name=file) loads, and how much of it is meant."""

    place: str  # folder, absolute, or hub id
    file: str = NAME
    scale: float = 1.0

    @property
    def path(self) -> Path | None:
        """The file on this machine; None of a hub id."""
        return Path(self.place, self.file) if Path(self.place).is_absolute() else None

    def __str__(self) -> str:
        return f"{self.place}/{self.file}"


def find_lora(text: str) -> LoraSource:
    """Resolve name@scale: a safetensors file, a folder that holds one, a run or export folder, org/name, org/name/file.

    Raises:
        ValueError: it is none of these; the message says why.
    """
    name, scale = split_scale(text)
    path = Path(name)
    on_hub = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)/(.+\.safetensors)", name)
    if path.is_file():
        if path.suffix != ".safetensors":
            kind = "a pickled file, which runs whatever code it holds" if path.suffix in PICKLED else "no safetensors file"
            raise ValueError(f"{name} is {kind}; give the LoRA as safetensors")
        return LoraSource(str(path.parent.resolve()), path.name, scale)
    if path.is_dir():
        folder = next((place for place in (path, path / "export") if any(place.glob("*.safetensors"))), path)
        files = sorted(file.name for file in folder.glob("*.safetensors"))
        if NAME not in files and len(files) != 1:
            had = f"several LoRA files ({', '.join(files)}); name one" if files else "no .safetensors file; give a LoRA"
            raise ValueError(f"{name} holds {had}")
        return LoraSource(str(folder.resolve()), NAME if NAME in files else files[0], scale)
    if is_hub_id(name):
        return LoraSource(name, scale=scale)
    if on_hub and path.suffix == ".safetensors" and not path.parent.exists():
        return LoraSource(*on_hub.groups(), scale)
    raise ValueError(f"{name} does not exist (seen from {Path.cwd()}); give a .safetensors file, a folder or a hub id org/name")


def split_scale(text: str) -> tuple[str, float]:
    """`name@0.8` -> name, 0.8; without a number after it the scale is 1.

    Raises:
        ValueError: a scale that is no LoRA, or none that is finite.
    """
    name, at, tail = text.rpartition("@")
    try:
        scale = float(tail)
    except ValueError:
        return text, 1.0
    if not at:
        return text, 1.0
    if not math.isfinite(scale) or scale == 0:
        raise ValueError(f"{text}: the scale {tail} must be a finite number other than 0; leave it out for 1")
    return name, scale


def check_lora(text: str) -> Iterator[str]:
    """What is wrong with the name of a LoRA."""
    try:
        find_lora(text)
    except ValueError as error:
        yield str(error)


def identities(loras: Sequence[str]) -> list[str] | None:
    """Names that mean the same from every folder; None of no LoRAs. What cannot be found keeps its name."""
    found = []
    for text in loras:
        try:
            lora = find_lora(text)
            found.append(f"{lora}@{lora.scale:g}")
        except ValueError:
            found.append(text)
    return found or None
