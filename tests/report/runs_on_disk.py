"""Run folders made by hand, small."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from stepdistill.evaluate.grid import keep_pictures
from stepdistill.recipe import dump_recipe, load_recipe
from stepdistill.samplers import Sampler
from stepdistill.sidecar import Serving

HOSTILE = '<script>alert(1)</script> & "a cat"'
PROMPTS = [HOSTILE, "a red ring"]
PROVENANCE = {"compared": {"n": 8, "noise": "by index"}, "told": {"torch": "2"}}
TEACHER = {"who": "teacher", "steps": 25, "nfe": 50, "guidance": 3.0, "solver": "UniPC", "n": 8, "fd": 1.5}
STUDENT = {"who": "student", "steps": 2, "nfe": 2, "guidance": 1.0, "solver": "", "n": 8, "fd": 2.25, "ms": 7.0}


def export(folder: Path, name: str = "quickstart") -> None:
    """The sidecar of an export, without its weights."""
    sampler = {n: Sampler("LCMScheduler", {}, {"num_inference_steps": n}) for n in (1, 2)}
    lora = {"rank": 16, "alpha": 16, "scale": 1.0, "scale_range": [0.5, 1.0], "targets": ["to_q"], "loader": "diffusers"}
    told = Serving(
        name=name,
        pipeline="StableDiffusionPipeline",
        network="unet",
        model="stepdistill/tiny-sd",
        revision=None,
        variant=None,
        dtype="float32",
        size=(64, 64),
        frames=None,
        fps=None,
        strategy="dmd2",
        steps=2,
        samplers=sampler,
        worn=(("student", "unet"),),
        call={"guidance_scale": 1.0},
        reseed=False,
        lora=lora,
        prompts=tuple(PROMPTS),
        versions={"stepdistill": "0"},
        recipe_hash="abc",
        recipe={},
        files={"diffusers": ("pytorch_lora_weights.safetensors",)},
    )
    folder.mkdir()
    (folder / "stepdistill.json").write_text(told.to_json())


def pictures(seed: int, shape: tuple[int, int] = (8, 8)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (len(PROMPTS), *shape, 3), np.uint8)


def drawn(
    shelf: Path, rows: dict[str, int], prompts: list[str] = PROMPTS, shape: tuple[int, int] = (8, 8), seed: int = 0
) -> None:
    """A gallery. rows: its folders, each with what its pictures are made of; seed: what is noted of their noise."""
    for row, kind in rows.items():
        keep_pictures(shelf / row, pictures(kind, shape))
    (shelf / "prompts.json").write_text(json.dumps(prompts))
    (shelf / "seed.json").write_text(json.dumps(seed))


def measured(folder: Path, rows=(TEACHER, STUDENT), provenance=PROVENANCE) -> None:
    (folder / "eval").mkdir(exist_ok=True)
    (folder / "eval" / "tiny.json").write_text(json.dumps({"format": 1, "rows": rows, "provenance": provenance}))


def log(folder: Path, steps: int, names=("student/matching", "student/lr", "critic/grad_norm")) -> None:
    rng = np.random.default_rng(0)
    lines = [{"step": k, "seconds": k / 2, **dict.fromkeys(names, float(rng.uniform(1, 2)))} for k in range(1, steps + 1)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def bare(folder: Path, *overrides: str) -> Path:
    """A run that has not begun."""
    folder.mkdir()
    (folder / "recipe.yaml").write_text(dump_recipe(load_recipe("quickstart", overrides)))
    return folder


def whole(folder: Path) -> Path:
    """A finished run."""
    bare(folder)
    log(folder, 205)
    export(folder / "export")
    measured(folder)
    drawn(folder / "samples" / "pictures" / "teacher", {"teacher-25steps": 0, "teacher-2steps": 1})
    for step in (0, 100, 205):
        drawn(folder / "samples" / "pictures" / f"{step:06d}", {"student-2steps": step, "student-1steps": step + 1})
    Image.new("RGB", (64, 48)).save(folder / "samples" / "000205.png")
    return folder
