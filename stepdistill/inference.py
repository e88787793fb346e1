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
from .families.base import Family
from .lora_sources import LoraSource, find_lora
from .recipe import Recipe, dump_recipe, strategy_name
from .samplers import Sampler, find_sampler
from .sampling import Inference
from .sources import embedded_models

SIDECAR = "stepdistill.json"
FORMAT = 4  # of the sidecar; a change that makes older ones unreadable raises it
STEPS = (1, 2, 4, 8)  # numbers of steps that are tried besides those that a recipe names
WHOLE = ("pipeline", "fused")  # files that are whole pipeline folders; the others are LoRA files

Part = tuple[str, str]  # a student, and the network of the pipeline that it plays


@dataclass(frozen=True)
class Serving:
    """The base model, what lies on it, and the arguments of its stock pipeline."""

    name: str  # of the recipe
    pipeline: str  # class in diffusers
    network: str  # attribute of the pipeline that was distilled, the first of them if it has several
    model: str  # what was distilled: embedded name, absolute folder, or hub id
    revision: str | None
    variant: str | None
    dtype: str  # of the base
    size: tuple[int, int]  # height and width in pixels that the student was trained at
    frames: int | None  # of its videos; None: it draws pictures
    fps: float | None  # frames a second
    strategy: str
    steps: int  # which of `samplers` is meant
    samplers: dict[int, Sampler]  # for every number of steps that is known to work
    worn: tuple[Part, ...]  # all parts: of two experts each has its own student, or both have the same
    call: dict[str, Any]  # of pipe(...), whatever the steps: guidance_scale; size and num_frames if not the base's own
    reseed: bool  # the pipeline does not give its generator to the scheduler, which draws from torch.manual_seed
    lora: dict[str, Any] | None  # rank, alpha, scale, scale_range, targets, loader; None: the whole network was trained
    prompts: tuple[str, ...]  # examples
    versions: dict[str, str]
    recipe_hash: str
    loras: tuple[LoraSource, ...] = ()  # what lies between the model and the student
    negative_prompt_supported: bool = False  # without classifier-free guidance nothing reads it
    quantize: str | None = None  # to what the base was quantized in training, int8 or nf4, as it is when the LoRA is checked
    files: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # format -> names in the export, as `worn`

    @property
    def sampler(self) -> Sampler:
        return self.samplers[self.steps]

    @property
    def students(self) -> tuple[str, ...]:
        """Those who take the steps, in the order in which they take over; more than one with phased strategies."""
        return tuple(dict.fromkeys(self.sampler.students))

    @property
    def take_turns(self) -> bool:
        """Whether students follow one another on the same network."""
        return len({network for _, network in self.worn}) < len(self.worn)

    @property
    def animation(self) -> dict[str, int]:
        """How PIL saves the frames of a video: milliseconds each, over and over."""
        return {"duration": round(1000 / self.fps), "loop": 0}

    @property
    def arguments(self) -> dict[str, Any]:
        """All arguments of pipe(prompt, ...)."""
        return self.sampler.call | self.call

    def into(self, network: str) -> dict[str, bool]:
        """What `load_lora_weights` must be told to load a file into a network of the pipeline."""
        return {} if network == self.network else {f"load_into_{network}": True}

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
            tree |= {key: tuple(tree[key]) for key in ("prompts", "size")} | {"worn": tuple(map(tuple, tree["worn"]))}
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
        reseed=how.draws and not family.passes_generator,
        lora=lora,
        prompts=tuple((recipe.eval.prompts or read_prompts(recipe.data.prompts, 2))[:2]),
        versions={"stepdistill": __version__} | {name: metadata.version(name) for name in packages},
        recipe_hash=recipe_hash(recipe),
        loras=tuple(find_lora(lora) for lora in recipe.model.loras),
        quantize=recipe.model.quantize,
    )


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
