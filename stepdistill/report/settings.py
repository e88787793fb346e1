"""How a student is used: lines of Python, its settings, and what it was made of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..card_notes import literal
from ..evaluate import results
from ..sidecar import Serving


def few_lines(told: Serving, run: Path) -> str:
    """Python that draws a picture, or a video, with stepdistill."""
    arguments = "".join(f", {name}={value!r}" for name, value in told.arguments.items())
    prompt = literal(told.prompts[0])
    lines = ["import stepdistill", "", f"pipe = stepdistill.load_pipeline({literal(str(run))})"]
    if told.frames is None:
        lines += [f"image = pipe({prompt}{arguments}).images[0]", 'image.save("picture.png")']
    else:
        options = ", ".join(f"{name}={value}" for name, value in told.animation.items())
        lines += [f'frames = pipe({prompt}{arguments}, output_type="pil").frames[0]']
        lines += [f'frames[0].save("video.webp", save_all=True, append_images=frames[1:], {options})']
    return "\n".join(lines)


def facts(told: Serving) -> dict[str, str]:
    """What holds for every number of steps."""
    made = {
        "base model": told.model,
        "pipeline": told.pipeline,
        "size": f"{told.size[1]} x {told.size[0]}" + (f", {told.frames} frames" if told.frames else "") + " pixels",
        "dtype": told.dtype + (f", base in {told.quantize}" if told.quantize else ""),
    }
    if told.lora:
        low, high = told.lora["scale_range"]
        made["LoRA"] = (
            f"rank {told.lora['rank']}, alpha {told.lora['alpha']}, scale {told.lora['scale']:g} ({low:g} to {high:g})"
        )
    made["LoRAs below"] = ", ".join(f"{lora.place} {lora.file or ''} at {lora.scale:g}" for lora in told.loras)
    made["files"] = ", ".join(name for names in told.files.values() for name in names)
    return {name: text for name, text in made.items() if text}


def samplers(told: Serving) -> list[dict[str, str]]:
    """A row for each number of steps that is known to work: scheduler, arguments of pipe(...), the words of other programs."""
    return [
        {
            "steps": str(n),
            "scheduler": sampler.scheduler,
            "arguments": ", ".join(f"{name}={value!r}" for name, value in told.at(n).arguments.items()),
            "ComfyUI": _words(sampler.comfyui),
            "A1111": _words(sampler.a1111),
        }
        for n, sampler in told.samplers.items()
    ]


def leaves(tree: Mapping[str, Any]) -> dict[str, str]:
    """Everything in a tree that is no mapping, as text by its name in dots."""
    found = results.leaves(tree)
    return {name: x if isinstance(x, str) else json.dumps(x, ensure_ascii=False, default=str) for name, x in found}


def _words(values: Mapping[str, Any] | None) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items()) if values else ""
