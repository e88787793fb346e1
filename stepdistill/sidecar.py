"""What an export says of itself: one object, `Serving`, the sidecar stepdistill.json in its folder, checked as it is read.

It holds how the student is sampled with its stock pipeline, which export, card, check and `sample` read (`serve` opens an
export by it alone), and the recipe, so that `assemble.restore` can make the roles again.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .errors import UserError
from .fields import numbers, ranged
from .foreign import is_plain, leaves, parse_json, read_json, shaped, shorten
from .lora_sources import LoraSource
from .samplers import Sampler
from .sources import embedded_models

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

SIDECAR = "stepdistill.json"
FORMAT = 5  # of the sidecar; a change that makes older ones unreadable raises it
FORMS = ("diffusers", "kohya", "fused", "pipeline")  # of `files`
WHOLE = ("pipeline", "fused")  # files that are whole pipeline folders; the others are LoRA files

OURS = {"prompt", "generator", "output_type", "return_dict"}  # arguments of pipe(...) that no sidecar gives
EDGE = 2**14  # the largest whole number among arguments: pixels, steps, frames
TABLE = 10**6  # the largest whole number of a scheduler's config

Part = tuple[str, str]  # a student, and the network of the pipeline that it plays


@dataclass(frozen=True)
class Adapter:
    """What `Serving.lora` holds."""

    rank: int = ranged(low=1, high=2**14)
    alpha: float
    scale: float
    scale_range: tuple[float, float]
    targets: tuple[str, ...]
    loader: Literal["diffusers", "peft"]


@dataclass(frozen=True)
class Serving:
    """The base model, what lies on it, and the arguments of its stock pipeline."""

    name: str  # of the recipe
    pipeline: str  # class in diffusers
    network: str  # attribute of the pipeline that was distilled, the first of them if it has several
    model: str  # what was distilled: embedded name, absolute folder, or hub id
    revision: str | None
    variant: str | None
    dtype: Literal["float32", "bfloat16", "float16"]  # of the base
    size: tuple[int, int] = ranged(low=1, high=EDGE)  # height and width in pixels that the student was trained at
    frames: int | None = ranged(low=1, high=EDGE)  # of its videos; None: it draws pictures
    fps: float | None = ranged(above=0, high=1000)  # frames a second
    strategy: str
    steps: int = ranged(low=1, high=EDGE)  # which of `samplers` is meant
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
    quantize: Literal["int8", "nf4"] | None = (
        None  # to what the base was quantized in training, int8 or nf4, as it is when the LoRA is checked
    )
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
            return cls.from_tree(parse_json(text))
        except ValueError as error:
            raise UserError(f"{SIDECAR} cannot be read: {error}; export the run again") from None

    @classmethod
    def from_tree(cls, tree: Any) -> Serving:
        """The same of its JSON value. Raises ValueError: it is not what an export of this version holds."""
        if not isinstance(tree, dict) or tree.get("format") != FORMAT:
            raise ValueError("it was written by another version of stepdistill")
        told = shaped({key: value for key, value in tree.items() if key != "format"}, cls)
        if told.lora is not None:
            shaped(told.lora, Adapter, "lora")
        for fault in _faults(told):
            raise ValueError(fault)
        return told


def _faults(told: Serving) -> Iterator[str]:
    """What annotations do not say of a sidecar: names are names, since code and paths are made of them; numbers can be."""
    if not is_plain(told.name) or not re.fullmatch(r"\w+(\.\w+)*(:\w+)?", told.strategy):
        yield f"{shorten(told.name)}, made by {shorten(told.strategy)}, must be plain names"
    students = {who for sampler in told.samplers.values() for who in sampler.students}
    calls = [told.call, *(sampler.call for sampler in told.samplers.values())]
    words = {told.pipeline, told.network, *students, *(word for part in told.worn for word in part)}
    words |= {name for call in calls for name in call}
    for word in sorted(words):
        if not re.fullmatch(r"[A-Za-z]\w{0,99}", word) or word in OURS:
            yield f"{shorten(word)} cannot be the name of a pipeline, network, student or argument"
    others = [words for sampler in told.samplers.values() for words in (sampler.comfyui, sampler.a1111) if words]
    for word in (word for words in others for pair in words.items() for word in pair):
        if not isinstance(word, int | float | None) and not re.fullmatch(r"\w[\w +.()/-]{0,99}", str(word)):
            yield f"{shorten(word)} is no word of ComfyUI or A1111"
    for sampler in told.samplers.values():
        if not re.fullmatch(r"\w{1,90}Scheduler", sampler.scheduler):
            yield f"{shorten(sampler.scheduler)} is no scheduler"
        if any(isinstance(x, int) and abs(x) > TABLE for x in numbers(list(sampler.config.values()))):
            yield f"the config of {sampler.scheduler} holds a number over {TABLE}"
    for value in (value for call in calls for value in call.values()):
        if not isinstance(value, bool | str | None) and (not (found := numbers(value)) or max(map(abs, found)) > EDGE):
            yield f"{shorten(value)} cannot be an argument of a pipeline"
    if not told.worn:
        yield "no student plays a network"
    if not told.prompts:
        yield "it names no prompt"
    if told.steps not in told.samplers:
        yield f"it has no sampler of its own {told.steps} steps"
    if (told.frames is None) != (told.fps is None):
        yield "frames and fps must both be null, or neither"
    for form, names in told.files.items():
        if form not in FORMS:
            yield f"files of an unknown format {shorten(form)}"
        for name in names:
            if not is_plain(name) or (form not in WHOLE and not name.endswith(".safetensors")):
                yield f"{shorten(name)} is no name of a file in the export's folder"
    for lora in told.loras:
        if not is_plain(lora.file) or not lora.file.endswith(".safetensors"):
            yield f"{shorten(lora.file)} is no name of a LoRA file"


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
    """The sidecar of an export folder.

    Raises:
        UserError: it is not what an export holds, or names files that lie elsewhere.
    """
    file = folder / SIDECAR
    try:
        told = Serving.from_tree(read_json(file))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}; export the run again") from None
    for name in (name for names in told.files.values() for name in names):
        if leaves(folder / name, folder):
            raise UserError(f"{folder / name} is a link that leaves the export; put the file itself there, or export again")
    return told
