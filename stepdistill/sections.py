"""The sections of a recipe as dataclasses, and the rules that tie them together.

Every key of the YAML is a field, and every field's comment is its documentation. Relative paths are seen from where the
command runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .fields import Place, fields_of, numbers, ranged
from .lora_sources import check_lora, identities
from .schedules import RectifiedFlow
from .sources import check_folder, check_images, check_model, check_pairs, check_prompts, pipeline_class

Keys = tuple[str, ...]  # a dotted key, split


@dataclass(frozen=True)
class Model:
    source: Place  # embedded name (stepdistill/tiny-sd), folder of a diffusers pipeline, or hub id (org/name)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the frozen base; what is trained stays float32
    revision: str | None = None  # branch, tag or commit of a hub id
    variant: str | None = None  # the fp16 in diffusion_pytorch_model.fp16.safetensors
    # of the frozen network's linear layers, in memory: int8 (torchao) or nf4, 4 bits (bitsandbytes); null: dtype
    quantize: Literal["int8", "nf4"] | None = None
    # LoRAs below everything that is trained, files, folders or hub ids, as name or name@0.8
    loras: tuple[Place, ...] = ()


@dataclass(frozen=True)
class Lora:
    rank: int = ranged(64, low=1, high=1024)  # of every adapter; its alpha equals it
    targets: list[str] | None = None  # names of the layers that wear adapters; null: those of the pipeline family


@dataclass(frozen=True)
class Data:
    # a prompt a line (.txt), or in a column prompt, caption or text (.jsonl, .csv, .parquet); stepdistill/prompts has some
    # thousands of all kinds, stepdistill/tiny the captions of the embedded world
    prompts: Place
    # folder of pictures with a .txt caption beside each, or a metadata.jsonl; of .tar shards of such (webdataset); of tables
    # (.parquet, or what save_to_disk of `datasets` wrote); or stepdistill/tiny
    images: Place | None = None
    # so many prompts or pictures of what the package has; of files, at most so many
    count: int | None = ranged(None, low=1, high=10**7)
    # side, or [height, width], in pixels; null: what the network was made for
    resolution: int | tuple[int, int] | None = ranged(None, low=8, high=8192)
    # true: pictures keep about their aspect ratio, between 1:2 and 2:1, at about the area of `resolution`, whose noise schedule
    # holds for all; every iteration has one shape, for prompts alone a drawn one
    buckets: bool = False
    frames: int | None = ranged(None, low=1, high=10**4)  # of videos; null: as many as the pipeline makes by itself
    cache: Place | None = None  # folder of encoded prompts and pictures, for any number of runs; null: cache/ beside the run's

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width in pixels."""
        return (self.resolution, self.resolution) if isinstance(self.resolution, int) else self.resolution


@dataclass(frozen=True)
class Pairs:
    """Noise, and where the teacher's ODE takes it. Only strategies that need pairs read this."""

    folder: Place | None = None  # pairs that `stepdistill pairs` made; null: made before training, in the run's folder
    count: int = ranged(2048, low=1, high=10**7)  # pairs; where prompts are fewer, they come again with other noise
    steps: int = ranged(25, low=1, high=1000)  # of the teacher's deterministic first-order solver, DDIM or Euler
    guidance: float | None = ranged(None, low=1, high=1000)  # scale of the teacher; null: the strategy's own
    seed: int = ranged(0, low=0, below=2**63)  # of the noise
    batch: int = ranged(16, low=1, high=10**5)  # pairs made at a time
    shard: int = ranged(256, low=1, high=10**6)  # pairs a file; an interruption loses no more than the unfinished file


@dataclass(frozen=True)
class Optim:
    student_lr: float = ranged(1e-4, above=0, high=1)  # learning rate of the student
    critic_lr: float = ranged(1e-4, above=0, high=1)  # learning rate of the fake score and of discriminator heads
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"  # adamw8bit keeps its state in 8 bits a number (bitsandbytes)
    betas: tuple[float, float] = ranged((0.9, 0.99), low=0, below=1)  # AdamW's decays of gradient and its square
    weight_decay: float = ranged(0.0, low=0, high=1)  # AdamW's
    clip: float = ranged(1.0, above=0, high=10**9)  # largest norm of each player's gradient
    warmup: int = ranged(0, low=0, high=10**8)  # iterations in which learning rates rise from zero
    schedule: Literal["constant", "cosine"] = "constant"  # of the learning rates after the warm-up


@dataclass(frozen=True)
class Train:
    steps: int = ranged(low=1, high=10**8)  # iterations; one iteration is one batch
    batch: int = ranged(16, low=1, high=10**5)  # samples an iteration, over all processes and parts
    accumulate: int = ranged(1, low=1, high=10**5)  # parts of a batch, computed one after the other; divides batch
    seed: int = ranged(0, low=0, below=2**63)  # of everything random
    save_every: int = ranged(100, low=1, high=10**9)  # iterations between checkpoints
    keep: int = ranged(2, low=1, high=10**6)  # checkpoints that stay on disk
    # iterations in a row with a loss or gradient that is not finite which are left out; one more ends the training
    skip: int = ranged(0, low=0, high=10**8)
    # a player's losses of so many times their usual size, iteration after iteration, end the training; null: nothing does
    explosion: float | None = ranged(1000.0, above=1, high=1e6)
    precision: Literal["no", "bf16"] = field(  # of the computation; bf16 is autocast
        default="no", metadata={"refused": {"fp16": "training in fp16 diverges (range too small); use bf16"}}
    )
    checkpointing: bool = False  # recompute activations in backward: less memory, about a third more time
    compile: bool = False  # torch.compile of the network's repeated blocks: minutes at first, then quicker steps
    # networks in shares, on several processes: full, over all of them; hybrid, within each machine; null: whole on each. One
    # process holds everything in any case. Adapters and discriminator heads are never shared out
    shard: Literal["full", "hybrid"] | None = None
    attention: Literal["xformers"] | None = None  # kernels of attention in the network; null: PyTorch's own
    ema: float | None = ranged(None, above=0, below=1)  # decay of the average that is evaluated and exported
    # who else keeps curves, samples and figures, in the run's folder; null: TensorBoard where it is installed; []: nobody.
    # wandb is offline (later: wandb sync) unless the variable WANDB_MODE says online
    trackers: tuple[Literal["tensorboard", "wandb"], ...] | None = None


@dataclass(frozen=True)
class Eval:
    every: int = ranged(100, low=0, high=10**8)  # iterations between sample grids, and looks at the student; 0: never
    # pictures of such a look, which tells colours and diversity that leave the teacher's, and the best checkpoint; 0: none
    watch: int = ranged(32, low=0, high=10**4)
    n: int = ranged(2048, low=0, high=10**6)  # pictures behind each figure of the final table; 0: no table
    # student's numbers of steps in grids and table; null: its own, and those of 4, 2 and 1 that it can take
    steps: tuple[int, ...] | None = ranged(None, low=1, high=1000)
    prompts: list[str] | None = None  # of the sample grids; null: the first ones of data.prompts
    seed: int = ranged(0, low=0, below=2**63)  # of the noise in grids and table
    batch: int = ranged(64, low=1, high=10**5)  # pictures sampled at a time


@dataclass(frozen=True)
class Recipe:
    name: str  # of the run's folder and exported files; the recipe file's own name if left out
    # the strategy may be a class of another package, package.module:Class, and the model may bring code; false if left out
    trust_remote_code: bool
    model: Model
    lora: Lora | None  # null: trains full copies of the network
    strategy: Any  # name, one of STRATEGIES or package.module:Class, and the fields of that dataclass
    data: Data
    pairs: Pairs
    optim: Optim
    train: Train
    eval: Eval


SECTIONS = {"model": Model, "lora": Lora, "data": Data, "pairs": Pairs, "optim": Optim, "train": Train, "eval": Eval}


ONCE = (("model", "loras"), ("lora", "targets"), ("train", "trackers"), ("eval", "steps"))  # lists without repetition
MOST = {("model", "loras"): 50, ("lora", "targets"): 2000, ("eval", "steps"): 50, ("eval", "prompts"): 500}  # items of lists


def check(
    values: Mapping[str, Any], strategy: Any, strategy_name: str, families: Mapping[str, type], there: bool = True
) -> Iterator[tuple[Keys, str]]:
    """What is wrong between fields, and with the sources they name.

    values: by dotted key; of those that are wrong in themselves, and so left out, nothing is said.
    strategy: the instance, or None if it could not be made. families: by the pipeline classes that can be distilled.
    there: whether models and data on this disk must exist already; if not, only their form is checked.
    """
    if "model.source" in values:
        found = check_model(values["model.source"], values.get("model.variant"), families, there)
        yield from looked_at(("model", "source"), found)
    for lora in values.get("model.loras", ())[: MOST["model", "loras"]]:
        yield from looked_at(("model", "loras"), check_lora(lora))
    if strategy and (family := families.get(pipeline_class(values.get("model.source", "")))):
        yield from check_guidance(family, strategy, values.get("pairs.guidance"))
    if "data.prompts" in values:
        yield from looked_at(("data", "prompts"), check_prompts(values["data.prompts"], there))
    if values.get("data.images") is not None:
        yield from looked_at(("data", "images"), check_images(values["data.images"], there))
    for keys in (("data", "cache"), ("pairs", "folder")):
        if (folder := values.get(".".join(keys))) is not None:
            yield from looked_at(keys, check_folder(folder))
    if strategy:
        for message in strategy.check():  # "field: what is wrong" or just what is wrong
            name, _, rest = message.partition(": ")
            yield (("strategy", name), rest) if name in fields_of(type(strategy)) else (("strategy",), message)
        steps = values.get("train.steps")
        if steps and strategy.stage(steps - 1) < strategy.stages - 1:
            first = strategy.stage(steps - 1) + 1
            yield ("train", "steps"), f"{steps} end in stage {first} of {strategy.stages} of {strategy_name}; train for longer"
        if "x0" in strategy.needs and values.get("data.images", "") is None:
            others = f"or other settings (see: stepdistill explain {strategy_name})"
            remedy = f"give a folder of pictures with captions, or stepdistill/tiny, {others}"
            yield ("data", "images"), f"null, but strategy {strategy_name} learns from pictures; {remedy}"
        if "pairs" in strategy.needs and values.get("data.buckets"):
            yield ("data", "buckets"), f"true, but the pairs of strategy {strategy_name} have one size; set it to false"
        if "pairs" in strategy.needs and values.get("pairs.folder") is not None:
            model = {key: values.get(f"model.{key}") for key in ("source", "revision", "variant")}
            model["loras"] = identities(values.get("model.loras", ()))
            yield from looked_at(("pairs", "folder"), check_pairs(values["pairs.folder"], model, there))
    told = values.get("strategy.embed_guidance")
    if told is not None and "lora.rank" in values:
        yield ("strategy", "embed_guidance"), f"{told} adds an input, which a LoRA cannot; set lora: null, or this"
    if values.get("model.quantize") and not values.keys() & {"lora.rank", "lora.targets"}:
        kind = values["model.quantize"]
        yield ("model", "quantize"), f"{kind} freezes the network, which lora: null would train; give lora a rank, or null here"
    if values.get("model.quantize") and values.get("model.loras"):
        remedy = "give a model that has them in it (pipe.fuse_lora(), pipe.save_pretrained(folder)), or null here"
        yield ("model", "quantize"), f"{values['model.quantize']} layers cannot take model.loras in; {remedy}"
    yield from ((("train", "shard"), message) for message in check_shard(values))
    if values.get("lora.targets") == []:
        yield ("lora", "targets"), "[] leaves nothing to train; name layers, or write null for the family's own"
    batch, parts = values.get("train.batch", 0), values.get("train.accumulate", 1)
    if batch % parts:
        yield ("train", "accumulate"), f"{parts} must divide train.batch, which is {batch}"
    if values.get("eval.steps") == ():
        yield ("eval", "steps"), "[] must name at least one number of steps, as in [4, 2, 1]; write null for the student's own"
    for keys, most in MOST.items():
        if len(given := values.get(".".join(keys)) or ()) > most:
            yield keys, f"{len(given):,} are too many, at most {most}; leave some out"
    for keys in ONCE:
        for item, times in Counter(values.get(".".join(keys)) or ()).items():
            if times > 1:
                yield keys, f"{item} is there {times} times; keep one"
    for steps in (values.get("eval.steps") or ())[: MOST["eval", "steps"]] if strategy else ():
        try:
            strategy.inference(RectifiedFlow(), steps)
        except ValueError as error:
            yield ("eval", "steps"), f"{steps} cannot be: {error}"
    if 0 < values.get("eval.watch", 0) < 16:
        yield ("eval", "watch"), f"{values['eval.watch']} are too few pictures to tell anything from; use 16 or more, or 0"
    if values.get("eval.prompts") == []:
        yield ("eval", "prompts"), "[] must name at least one prompt; write null for the first ones of data.prompts"


def looked_at(keys: Keys, problems: Iterator[str]) -> Iterator[tuple[Keys, str]]:
    """The problems with a source, also that the disk does not show it."""
    try:
        yield from ((keys, message) for message in problems)
    except OSError as error:
        yield keys, f"{error.filename} cannot be read ({error.strerror}); give what you may read"


def check_shard(values: Mapping[str, Any]) -> Iterator[str]:
    """What cannot go with networks in shares; values: as in `check`."""
    if (how := values.get("train.shard")) is None:
        return
    if kind := values.get("model.quantize"):
        yield f"{how}, but {kind} layers cannot be shared out; set it to null, or model.quantize to null"
    if values.get("train.compile"):
        yield f"{how} does not go with train.compile true, which would compile around the gathering of weights; choose one"
    if values.get("optim.optimizer") == "adamw8bit" and not values.keys() & {"lora.rank", "lora.targets"}:
        yield f"{how}, but adamw8bit cannot keep the state of whole copies in shares; set optim.optimizer to adamw, or lora"


def check_guidance(family: Any, strategy: Any, pairs: float | None) -> Iterator[tuple[Keys, str]]:
    """What keeps the teacher from being guided as a strategy and its pairs want: guidance that is distilled into it.

    family: a pipeline family, or its class. pairs: the scale `pairs.guidance`.
    """
    if family.guidance_distilled is not True:  # of a class it may be a property: that is known once it is loaded
        return
    why = f"the guidance of a {family.pipeline} is distilled into it, so it has no unconditional prediction to be guided with"
    if getattr(strategy, "decoupled", False):
        yield ("strategy", "decoupled"), f"true, but {why}; set strategy.decoupled to false and strategy.guidance to 1"
        return
    for keys, scale in {("strategy", "guidance"): getattr(strategy, "guidance", 1.0), ("pairs", "guidance"): pairs}.items():
        if any(number != 1 for number in numbers(scale)):
            one = "1" if isinstance(scale, float) else "[1, 1]"
            yield keys, f"{scale}, but {why}; set {'.'.join(keys)} to {one}"
