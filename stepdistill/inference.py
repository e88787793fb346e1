"""How a student must be sampled with its stock pipeline: one object, `Serving`, behind export, card, check, `sample`.

It is what `stepdistill.json`, the sidecar of an export, holds; so `serve` can open an export and sample it from its folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import diffusers
import torch

from . import __version__
from .assemble import Distillation
from .data.prompts import read_prompts
from .errors import UserError
from .lora_sources import LoraSource, find_lora
from .recipe import Recipe, dump_recipe, strategy_name
from .samplers import Sampler, find_sampler
from .sources import embedded_models

SIDECAR = "stepdistill.json"
FORMAT = 3  # of the sidecar; a change that makes older ones unreadable raises it
STEPS = (1, 2, 4, 8)  # numbers of steps that are tried besides those that a recipe names
WHOLE = ("pipeline", "fused")  # files that are whole pipeline folders; the others are LoRA files


@dataclass(frozen=True)
class Serving:
    """The base model, what lies on it, and the arguments of its stock pipeline."""

    name: str  # of the recipe
    pipeline: str  # class in diffusers
    network: str  # attribute of the pipeline that was distilled
    model: str  # what was distilled: embedded name, absolute folder, or hub id
    revision: str | None
    variant: str | None
    dtype: str  # of the base
    size: tuple[int, int]  # height and width in pixels that the student was trained at
    frames: int | None  # of its videos; None: it draws pictures
    strategy: str
    steps: int  # which of `samplers` is meant
    samplers: dict[int, Sampler]  # for every number of steps that is known to work
    call: dict[str, Any]  # of pipe(...), whatever the steps: guidance_scale; height and width if not the base's own
    reseed: bool  # the pipeline does not give its generator to the scheduler, which draws from torch.manual_seed
    lora: dict[str, Any] | None  # rank, alpha, scale, scale_range, targets; None: the whole network was trained
    prompts: tuple[str, ...]  # examples
    versions: dict[str, str]
    recipe_hash: str
    loras: tuple[LoraSource, ...] = ()  # what lies between the model and the student
    negative_prompt_supported: bool = False  # without classifier-free guidance nothing reads it
    files: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # format -> names in the export, one a student

    @property
    def sampler(self) -> Sampler:
        return self.samplers[self.steps]

    @property
    def students(self) -> tuple[str, ...]:
        """Those who take the steps, in the order in which they take over; more than one with phased strategies."""
        return tuple(dict.fromkeys(self.sampler.students))

    @property
    def arguments(self) -> dict[str, Any]:
        """All arguments of pipe(prompt, ...)."""
        return self.sampler.call | self.call

    @property
    def base(self) -> str:
        """What from_pretrained takes: a folder, absolute, or a hub id."""
        return str(embedded_models().get(self.model, self.model))

    def build_scheduler(self) -> diffusers.SchedulerMixin:
        return self.sampler.build()

    def at(self, steps: int | None) -> Serving:
        """The same student in another number of steps (None: as it is).

        Raises:
            UserError: not one of those that are known to work.
        """
        if steps not in (None, *self.samplers):
            allowed = ", ".join(map(str, self.samplers))
            raise UserError(f"{self.name} cannot be sampled in {steps} steps; this student works in one of: {allowed}")
        return dataclasses.replace(self, steps=steps or self.steps)

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT} | dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Serving:
        """What `to_json` wrote.

        Raises:
            UserError: it is not that, or of a newer format.
        """
        try:
            tree = json.loads(text)
            if tree.pop("format") != FORMAT:
                raise UserError(f"this {SIDECAR} was written by another version of stepdistill; export the run again")
            samplers = {
                int(n): Sampler(**sampler | {"students": tuple(sampler["students"])}) for n, sampler in tree["samplers"].items()
            }
            files = {form: tuple(names) for form, names in tree["files"].items()}
            tree |= {key: tuple(tree[key]) for key in ("prompts", "size")}
            loras = tuple(LoraSource(**lora) for lora in tree.get("loras", ()))
            return cls(**tree | {"samplers": samplers, "files": files, "loras": loras})
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise UserError(f"{SIDECAR} cannot be read ({error!r}); export the run again") from None


def recipe_hash(recipe: Recipe) -> str:
    """Changes with any key of a resolved recipe."""
    return hashlib.sha256(dump_recipe(recipe).encode()).hexdigest()[:16]


def serving(distillation: Distillation, steps: int | None = None) -> Serving:
    """How this distillation's student is sampled in `steps` (None: the strategy's own number).

    It needs no weights: called before training, it refuses a student that could not be exported.

    Raises:
        UserError: it cannot be sampled in that many steps, no stock scheduler can do it, or it makes videos.
    """
    recipe, family = distillation.recipe, distillation.family
    if family.frames is not None:
        raise UserError(
            f"{recipe.model.source}: a {family.pipeline} makes videos, and only students that draw pictures can be sampled and "
            f"exported so far; train it from Python (stepdistill.assemble, stepdistill.trainer)"
        )
    how = distillation.inference(steps)
    samplers = {}
    for n in sorted({*STEPS, *distillation.counts} - {len(how.hops)}):
        with _skipping():
            samplers[n] = _sampler(distillation, n)
    samplers[len(how.hops)] = _sampler(distillation, steps)
    if recipe.lora is None:  # those programs load LoRA files
        samplers = {n: dataclasses.replace(sampler, comfyui=None, a1111=None) for n, sampler in samplers.items()}
    source = recipe.model.source
    folder = source not in embedded_models() and Path(source).is_dir()
    size = {} if family.size == family.native else dict(zip(("height", "width"), family.size, strict=True))
    packages, lora = ("diffusers", "torch", "peft"), None
    if recipe.lora:  # scale 1 is what was trained; on other fine-tunes of the same base less often looks better
        lora = {"rank": recipe.lora.rank, "alpha": recipe.lora.rank, "scale": 1.0, "scale_range": [0.5, 1.0]}
        lora["targets"] = list(recipe.lora.targets or family.lora_targets)
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
        strategy=strategy_name(recipe.strategy),
        steps=len(how.hops),
        samplers=dict(sorted(samplers.items())),
        call={"guidance_scale": family.sampler_guidance if how.guidance is None else how.guidance} | size,
        reseed=how.draws and family.kind == "flow",
        lora=lora,
        prompts=tuple((recipe.eval.prompts or read_prompts(recipe.data.prompts, 2))[:2]),
        versions={"stepdistill": __version__} | {name: metadata.version(name) for name in packages},
        recipe_hash=recipe_hash(recipe),
        loras=tuple(find_lora(lora) for lora in recipe.model.loras),
    )


def _sampler(distillation: Distillation, steps: int | None) -> Sampler:
    family, how = distillation.family, distillation.inference(steps)
    try:
        found = find_sampler(family.schedule, family.kind, family.pipe.scheduler.config, how, family.passes_sigmas)
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


def find_export(folder: Path) -> Path:
    """The export folder that is meant by a run folder or by itself.

    Raises:
        UserError: it is neither, or nothing was exported yet.
    """
    for place in (folder, folder / "export"):
        if (place / SIDECAR).is_file():
            return place
    if (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder} has no export yet; make one from its newest checkpoint: stepdistill export {folder}")
    raise UserError(f"{folder} is neither a run folder nor an export: it has no {SIDECAR}; give runs/<name>")


def read_export(folder: Path) -> Serving:
    """The sidecar of an export folder."""
    return Serving.from_json((folder / SIDECAR).read_text(encoding="utf-8"))
