"""What an export says of itself: one object, `Serving`, the sidecar stepdistill.json in its folder.

It holds how the student is sampled with its stock pipeline, which export, card, check and `sample` read (`serve` opens an
export by it alone), and the recipe, so that `assemble.restore` can make the roles again.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError
from .lora_sources import LoraSource
from .samplers import Sampler
from .sources import embedded_models

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

SIDECAR = "stepdistill.json"
FORMAT = 5  # of the sidecar; a change that makes older ones unreadable raises it
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
    recipe: dict[str, Any]  # its other sections, see `inference.published`
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

    def build_scheduler(self) -> SchedulerMixin:
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
            UserError: it is not that, or of another format.
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
            loras = tuple(LoraSource(**lora) for lora in tree["loras"])
            return cls(**tree | {"samplers": samplers, "files": files, "loras": loras})
        except UserError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"{SIDECAR} cannot be read ({error!r}); export the run again") from None


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
