"""How a distillation's student must be sampled with its stock pipeline: makes the `Serving` that its export will hold."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .assemble import Distillation
from .data.prompts import read_prompts
from .errors import UserError
from .families.base import Family
from .lora_sources import find_lora
from .recipe import Recipe, dump_recipe, strategy_name, to_tree
from .samplers import Sampler, find_sampler
from .sampling import Inference, Normal
from .sidecar import Part, Serving
from .sources import EMBEDDED, embedded_models

STEPS = (1, 2, 4, 8)  # numbers of steps that are tried besides those that a recipe names
PLACES = (("data", "prompts"), ("data", "images"), ("data", "cache"), ("pairs", "folder"))  # keys of files and folders


def recipe_hash(recipe: Recipe) -> str:
    """Changes with any key of a resolved recipe."""
    return hashlib.sha256(dump_recipe(recipe).encode()).hexdigest()[:16]


def published(recipe: Recipe) -> dict[str, Any]:
    """The sections of a recipe that `Serving` does not hold in other words, fit to be uploaded: of files and folders of this
    disk, which training alone needs, there are the last names only."""
    tree = {key: section for key, section in to_tree(recipe).items() if key not in ("name", "model")}
    for section, key in PLACES:
        place = tree[section][key]
        if place is not None and not place.startswith(EMBEDDED):
            tree[section][key] = Path(place).name
    return tree


def serving(distillation: Distillation, steps: int | None = None) -> Serving:
    """How this distillation's student is sampled in `steps` (None: the strategy's own number).

    It needs no weights: called before training, it refuses a student that could not be exported.

    Raises:
        UserError: it cannot be sampled in that many steps, or no stock pipeline can do it.
    """
    recipe, family, how = distillation.recipe, distillation.family, distillation.inference(steps)
    worn = wearers(family, how)
    samplers = {}
    for n in sorted({*STEPS, *distillation.counts} - {len(how.hops)}):
        with _skipping():
            if set(wearers(family, distillation.inference(n))) <= set(worn):
                samplers[n] = _sampler(distillation, n)
    samplers[len(how.hops)] = _sampler(distillation, steps)
    if recipe.lora is None:  # those programs load LoRA files
        samplers = {n: dataclasses.replace(sampler, comfyui=None, a1111=None) for n, sampler in samplers.items()}
    source = recipe.model.source
    folder = source not in embedded_models() and Path(source).is_dir()
    size = {} if family.size == family.native else dict(zip(("height", "width"), family.size, strict=True))
    if family.frames is not None:  # what a video's pipeline makes by itself is not always what its network was made for
        size = dict(zip(("height", "width", "num_frames"), (*family.size, family.frames), strict=True))
    packages, lora = ("diffusers", "torch", "peft"), None
    if recipe.lora:  # scale 1 is what was trained; on other fine-tunes of the same base less often looks better
        lora = {"rank": recipe.lora.rank, "alpha": recipe.lora.rank, "scale": 1.0, "scale_range": [0.5, 1.0]}
        lora["targets"] = list(recipe.lora.targets or family.lora_targets)
        lora["loader"] = "diffusers" if hasattr(family.pipe, "load_lora_weights") else "peft"  # who puts it on
    return Serving(
        name=recipe.name,
        pipeline=type(family.pipe).__name__,
        network=family.net_name,
        model=str(Path(source).resolve()) if folder else source,
        revision=recipe.model.revision,
        variant=recipe.model.variant,
        dtype=recipe.model.dtype,
        size=family.size,
        frames=family.frames,
        fps=family.fps,
        strategy=strategy_name(recipe.strategy),
        steps=len(how.hops),
        samplers=dict(sorted(samplers.items())),
        worn=worn,
        call=family.sampler_call | ({} if how.guidance is None else {"guidance_scale": how.guidance}) | size,
        reseed=reseeds(family, how),
        lora=lora,
        prompts=tuple((recipe.eval.prompts or read_prompts(recipe.data.prompts, 2))[:2]),
        versions={"stepdistill": __version__} | {name: metadata.version(name) for name in packages},
        recipe_hash=recipe_hash(recipe),
        recipe=published(recipe),
        loras=tuple(find_lora(lora) for lora in recipe.model.loras),
        quantize=recipe.model.quantize,
    )


def pipeline_normal(family: Family, dtype: torch.dtype, generator: torch.Generator, how: Inference) -> Normal:
    """New noise as a scheduler in the stock pipeline draws it: from the generator of the caller or, where the pipeline does not
    hand that on, from the state that torch.manual_seed sets."""
    device = family.pipe.device
    if reseeds(family, how):
        return lambda x: torch.randn(x.shape, device=device)
    return lambda x: torch.randn(x.shape, generator=generator, dtype=dtype).to(x)


def reseeds(family: Family, how: Inference) -> bool:
    """Whether the stock pipeline keeps its generator from a scheduler that draws."""
    return how.draws and not family.passes_generator


def wearers(family: Family, how: Inference) -> tuple[Part, ...]:
    """Which student plays which network of the pipeline, in the order of the steps; one student plays all of them.

    Raises:
        UserError: no stock pipeline can ask the networks in the way that this student was trained.
    """
    if how.told is not None and len({family.asked(time) for time in (how.told, *(hop.time for hop in how.hops))}) > 1:
        raise UserError(
            f"a stock pipeline cannot sample this student: the network hears time {how.told:g} at every step, but a "
            f"{family.pipeline} chooses between its experts by the time of the step; choose another strategy"
        )
    students = tuple(dict.fromkeys(hop.role for hop in how.hops))
    turns = len(students) > 1
    if family.rising and (turns or how.told is not None):
        why = "students take turns as their network's time falls" if turns else "the student hears one time at every step"
        raise UserError(f"{why}, and the time of a {family.pipeline}'s rises; choose another strategy")
    if turns and not hasattr(family.pipe, "load_lora_weights"):
        raise UserError(f"students take turns, and diffusers' {family.pipeline} loads no LoRAs; choose another strategy")
    if not turns:
        return tuple((students[0], network) for network in family.networks)
    worn = tuple(dict.fromkeys((hop.role, family.asked(hop.time)) for hop in how.hops))
    if len(family.networks) > 1 and len({network for _, network in worn}) < len(worn):
        steps = ", ".join(f"{hop.role} asks {family.asked(hop.time)} at {hop.time:.4g}" for hop in how.hops)
        raise UserError(
            f"a stock pipeline cannot sample these students: they would share an expert of a {family.pipeline} ({steps}); "
            f"choose phases and times such that each expert belongs to one student"
        )
    return worn


def _sampler(distillation: Distillation, steps: int | None) -> Sampler:
    family, how = distillation.family, distillation.inference(steps)
    try:
        config = family.pipe.scheduler.config
        about = family.passes_sigmas, family.takes, family.comfyui_shifter
        found = find_sampler(family.schedule, family.kind, config, how, *about)
    except ValueError as error:
        raise UserError(f"a stock pipeline cannot sample this student: {error}") from None
    told = None if how.told is None else family.timestep(torch.tensor(how.told)).item()
    return dataclasses.replace(found, told=told)


@contextmanager
def _skipping() -> Iterator[None]:
    """Leave out a number of steps that was not asked for."""
    try:
        yield
    except UserError:
        return
