"""The known models as data: a file each, with its hub ids, its pipeline class, and the configs of its parts. Nothing here
imports more than the standard library."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DENOISERS = ("unet", "transformer", "transformer_2")


@dataclass(frozen=True)
class Part:
    """One model or scheduler of a pipeline."""

    kind: str  # class of diffusers or transformers
    config: dict[str, Any]  # where it differs from that class's defaults
    found: str  # where the config was found
    parameters: int = 0  # none in a scheduler
    published: float | None = None  # count of its parameters, where one is published to the percent
    publication: str = ""  # and where


@dataclass(frozen=True)
class Architecture:
    """One model of the hub. Gated: its licence must be accepted before anything can be downloaded."""

    name: str
    hub: tuple[str, ...]  # ids of the same architecture
    pipeline: str  # class of diffusers
    licence: str
    gated: bool
    prompt: dict[str, tuple[int, ...]]  # what the family's encode_prompts makes of one prompt: name -> shape
    parts: dict[str, Part]
    config: dict[str, Any] = field(default_factory=dict)  # of the pipeline itself

    @property
    def denoisers(self) -> dict[str, Part]:
        return {name: part for name, part in self.parts.items() if name in DENOISERS}

    @property
    def parameters(self) -> int:
        """Of everything that is downloaded."""
        return sum(part.parameters for part in self.parts.values())


@cache
def known() -> dict[str, Architecture]:
    """Every architecture by its name."""
    return {file.stem: _read(file) for file in sorted(HERE.glob("*.json"))}


def find(hub_id: str) -> Architecture | None:
    """The architecture of a hub id, in whatever case; None if it is not known."""
    return next((a for a in known().values() if hub_id.lower() in map(str.lower, a.hub)), None)


def _read(file: Path) -> Architecture:
    tree = json.loads(file.read_text(encoding="utf-8"))
    return Architecture(
        name=file.stem,
        hub=tuple(tree["hub"]),
        pipeline=tree["pipeline"],
        licence=tree["licence"],
        gated=tree["gated"],
        prompt={name: tuple(shape) for name, shape in tree["prompt"].items()},
        parts={name: Part(part.pop("class"), **part) for name, part in tree["parts"].items()},
        config=tree.get("pipeline_config", {}),
    )
