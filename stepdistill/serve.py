"""Opens an export as a stock pipeline, and samples it."""

from __future__ import annotations

import functools
import inspect
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import diffusers
import torch

from . import distributed
from .errors import UserError, one_line
from .families.load import load_pipeline_folder, quiet, told_of
from .families.loras import fuse_loras, load_kohya
from .fields import unfit
from .foreign import read_tensors
from .lora_files import network_state
from .roles import wear_lora
from .sidecar import WHOLE, Serving, find_export, read_export

SUFFIXES = {False: (".png",), True: (".webp", ".png", ".gif")}  # of pictures, and of videos; the first is written unasked


def open_export(folder: Path, told: Serving, form: str, trusted: bool = False) -> diffusers.DiffusionPipeline:
    """A fresh stock pipeline with one of the export's formats (a key of `told.files`) on it, and the scheduler set.

    Where several students take turns, its network changes over by itself (see `take_turns`); where the student is told another
    time than its scheduler's, its network hears that (see `tell`). trusted: code that the base model brings may run.

    Raises:
        UserError: files of the export, or its base model, cannot be loaded.
    """
    files, written, dtype = told.files[form], read_export(folder).steps, getattr(torch, told.dtype)
    with quiet(), told_of(f"the export {folder}"):
        if form in WHOLE:
            pipe = load_pipeline_folder(str(folder / files[0]), dtype, trusted=trusted)
            net = getattr(pipe, told.network)
            safe = {"dtype": dtype, "use_safetensors": True, "local_files_only": True}
            others = [type(net).from_pretrained(folder / file, **safe).to(distributed.device()) for file in files[1:]]
            calls = [network.forward for network in (net, *others)]
        else:
            pipe = load_pipeline_folder(told.model, dtype, told.revision, told.variant, told.quantize, trusted)
            fuse_loras(pipe, told.loras)
            for (student, network), file in zip(told.worn, files, strict=True):
                if told.lora.get("loader") == "peft":
                    wear_lora(getattr(pipe, network), network_state(read_tensors(folder / file), network))
                    continue
                load = load_kohya if form == "kohya" else type(pipe).load_lora_weights
                name = student if told.take_turns else None
                load(pipe, folder, weight_name=file, adapter_name=name, use_safetensors=True, **told.into(network))
            net = getattr(pipe, told.network)
            calls = [with_adapter(pipe, student, net.forward) for student in told.students]
        if told.take_turns:
            take_turns(net, [calls[told.students.index(student)] for student in told.sampler.students])
        if told.sampler.told is not None:
            tell(net, told.sampler.told)
        kind = getattr(diffusers, told.sampler.scheduler)
        pipe.scheduler = (
            kind.from_pretrained(folder / "scheduler", local_files_only=True)
            if told.steps == written
            else told.build_scheduler()
        )
    return pipe.to(distributed.device())


def with_adapter(pipe: diffusers.DiffusionPipeline, adapter: str, forward: Callable) -> Callable:
    """What forward does with that LoRA of the pipeline on, and no other."""

    def call(*args, **kwargs):
        if pipe.get_active_adapters() != [adapter]:
            pipe.set_adapters(adapter)
        return forward(*args, **kwargs)

    return call


def take_turns(net: torch.nn.Module, calls: Sequence[Callable]) -> None:
    """Let the k-th step of sampling call calls[k] for net: a step is over when the time falls, a picture when it rises."""
    signature, at, last = inspect.signature(net.forward), 0, math.inf

    @functools.wraps(net.forward)
    def forward(*args, **kwargs):
        nonlocal at, last
        t = float(torch.as_tensor(signature.bind(*args, **kwargs).arguments["timestep"]).flatten()[0])
        at, last = (at if t == last else at + 1 if t < last < math.inf else 0), t
        if at == len(calls):
            raise ValueError(
                f"this pipeline was loaded for {at} steps; load it for another number: load_pipeline(..., steps=N)"
            )
        return calls[at](*args, **kwargs)

    net.forward = forward


def tell(net: torch.nn.Module, time: float) -> None:
    """Let net hear this time, in its own units, in whatever call: no stock scheduler tells it another than its own."""
    signature = inspect.signature(net.forward)

    def hear(_net, args, kwargs):
        call = signature.bind(*args, **kwargs)
        call.arguments["timestep"] = torch.full_like(torch.as_tensor(call.arguments["timestep"]), time, dtype=torch.float32)
        return call.args, call.kwargs

    net.register_forward_pre_hook(hear, with_kwargs=True)


def load_pipeline(run_folder: Path | str, steps: int | None = None) -> diffusers.DiffusionPipeline:
    """The stock pipeline of a run's student: LoRA loaded (or the whole trained copy), scheduler set for `steps`.

    Args:
        run_folder: a run folder, or an export folder.
        steps: evaluations; None: the student's own number. What pipe(...) then needs is `read_export(...).arguments`.

    Raises:
        UserError: nothing is exported there, or the student does not work in that many steps.
    """
    folder = find_export(Path(run_folder))
    told = read_export(folder).at(steps)
    return open_export(folder, told, next(iter(told.files)))


def sample_run(run: Path, prompt: str, steps: int | None = None, seed: int = 0, out: Path | None = None) -> Path:
    """Draw one picture, a PNG, or one video, an animation, with the stock pipeline of a run or export folder; returns its path.

    out: its suffix is one of SUFFIXES; None: a name made of prompt, steps and seed, in the folder where the command runs.

    Raises:
        UserError: an empty prompt, a seed or number of steps that does not exist, or an `out` that cannot be written.
    """
    check_request(prompt, seed)
    told = read_export(find_export(run)).at(steps)
    out = destination(out, f"{words(prompt)}_{told.steps}steps_seed{seed}", SUFFIXES[told.frames is not None])
    pipe = load_pipeline(run, steps)
    with torch.random.fork_rng():  # one seed for the pipeline's generator and for schedulers that take no generator
        made = pipe(prompt=prompt, generator=torch.manual_seed(seed), output_type="pil", return_dict=False, **told.arguments)[
            0
        ][0]
    if told.frames is None:
        made.save(out)
    else:
        made[0].save(out, save_all=True, append_images=made[1:], **told.animation)
    return out


def check_request(prompt: str, seed: int) -> None:
    """Raises UserError for a prompt that is empty or cannot be read, and for a seed that does not exist."""
    if not prompt.strip():
        raise UserError("--prompt is empty; say what to draw")
    if fault := unfit(prompt, place=False):
        raise UserError(f"--prompt {one_line(prompt)[:80]} {fault}")
    if not -(2**63) <= seed < 2**64:
        raise UserError(f"--seed {seed} is not a 64-bit number")


def words(prompt: str) -> str:
    """A prompt as a part of a file's name."""
    return re.sub(r"\W+", "-", prompt.lower()).strip("-")[:60] or "picture"


def destination(out: Path | None, name: str, suffixes: Sequence[str]) -> Path:
    """Where a picture is written: `out`, or (None) a file of that name and the first suffix where the command runs.

    Raises:
        UserError: it has none of the suffixes, lies in no folder, or cannot be written.
    """
    out = out or Path(f"{name}{suffixes[0]}")
    if out.suffix.lower() not in suffixes:
        raise UserError(f"--out {out} must end in {' or '.join(suffixes)}")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: {out.parent} is no folder; make it first: mkdir -p {out.parent}")
    if out.exists() and not out.is_file():
        raise UserError(f"--out {out} is there, and is no file; give another name")
    if not os.access(out if out.exists() else out.parent, os.W_OK):
        raise UserError(f"--out {out} cannot be written; name a place that you may write to")
    return out
