"""From a recipe's model source to a family: embedded teacher, folder, or hub id; safetensors only."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import diffusers.utils.logging
import torch
import transformers.utils.logging
from diffusers import DiffusionPipeline
from huggingface_hub.constants import HF_HUB_OFFLINE
from safetensors import SafetensorError

from ..errors import UserError
from ..lora_sources import LoraSource
from ..sources import check_model, embedded_models, foreign_code, is_hub_id
from . import FAMILIES
from .base import Family
from .loras import fuse_loras
from .probed import notice, probed
from .quantize import DENOISERS, keep_gradients, quantization, without_gpu

FAULTS = (OSError, SafetensorError, ValueError, RuntimeError, LookupError, AttributeError, TypeError, MemoryError)  # of files


def load_pipeline_folder(
    source: str,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    variant: str | None = None,
    quantize: str | None = None,
    trusted: bool = False,
) -> DiffusionPipeline:
    """A stock pipeline in evaluation mode, from safetensors files only; quantize: its network, to int8 or nf4.

    Nothing but a hub id is asked for over the network. trusted: code that the model brings may run.

    Raises:
        UserError: the package that quantizes is not installed, the hub does not give the model, its files cannot be read, or
            it brings code and is not trusted.
    """
    options = {"quantization_config": quantization(quantize, dtype)} if quantize else {}
    options |= {"variant": variant, "use_safetensors": True, "trust_remote_code": trusted}
    folder = embedded_models().get(source, Path(source))
    with quiet(), without_gpu(), told(source):
        if is_hub_id(source):
            folder = Path(DiffusionPipeline.download(source, revision=revision, **options))
        check_files(source, folder, trusted)
        pipe = DiffusionPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True, **options)
    for net in filter(None, (getattr(pipe, name, None) for name in DENOISERS)):
        keep_gradients(net)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def check_files(source: str, folder: Path, trusted: bool = False) -> None:
    """Raises UserError where a pipeline folder cannot be read, holds pickled weights alone or, unless trusted, brings code."""
    if not is_hub_id(source):
        for problem in check_model(source):
            raise UserError(f"model.source {problem}")
    try:
        code = None if trusted else next(foreign_code(folder), None)
    except (OSError, ValueError) as error:
        raise UserError(f"model.source {source}: its configs cannot be read ({error}); save the pipeline again") from None
    if code is not None:
        raise UserError(
            f"model.source {source} brings code: {code}; read it, and if you trust it set trust_remote_code: true in the recipe"
        )


@contextmanager
def told(source: str) -> Iterator[None]:
    """Raise what a hub says of a model that it does not give, or a loader of files, as a UserError with the remedy."""
    try:
        with told_of(f"model.source {source}") if not is_hub_id(source) else nullcontext():
            yield
    except OSError as error:  # of requests, of huggingface_hub, and what diffusers makes of them
        whole = " ".join(f"{type(e).__name__} {e}" for e in (error, error.__cause__, error.__context__) if e)
        if "Gated" in whole or "401" in whole or "403" in whole:
            remedy = f"accept the licence at https://huggingface.co/{source} and log in once: hf auth login"
            raise UserError(f"model.source {source}: the hub gives it only to who accepted its licence; {remedy}") from None
        if HF_HUB_OFFLINE or "offline" in whole.lower() or "Connection" in whole:
            remedy = "go online (unset HF_HUB_OFFLINE), or give the folder of a copy"
            raise UserError(
                f"model.source {source}: there is no complete copy here, and the hub is out of reach; {remedy}"
            ) from None
        remedy = "mend the id, model.revision or model.variant, log in if it is private (hf auth login), or give a folder"
        raise UserError(f"model.source {source}: the hub has no such pipeline, or not for you; {remedy}") from None


@contextmanager
def told_of(what: str) -> Iterator[None]:
    """Raise what a loader says of files that it cannot read, in whatever way, as a UserError."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except FAULTS as error:
        why = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise UserError(f"{what} cannot be loaded ({why[:300]}); save or fetch it again") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what diffusers, transformers and peft say while they load: bars of milliseconds, notes on torchvision."""
    loggers = (diffusers.utils.logging, transformers.utils.logging)
    before = [(logger.get_verbosity(), logger.is_progress_bar_enabled()) for logger in loggers]
    for logger in loggers:
        logger.set_verbosity_error()
        logger.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several LoRAs are the idea
            yield
    finally:
        for logger, (verbosity, bar) in zip(loggers, before, strict=True):
            logger.set_verbosity(verbosity)
            if bar:
                logger.enable_progress_bar()


def load_family(
    source: str,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    variant: str | None = None,
    quantize: str | None = None,
    device: torch.device | str = "cpu",
    size: tuple[int, int] | None = None,
    frames: int | None = None,
    loras: Sequence[LoraSource] = (),
    trusted: bool = False,
) -> Family:
    """The family of the pipeline at source, for pictures of that height and width in pixels, or videos of so many frames
    (None: the network's own); quantize, trusted: as above. loras: fused into its weights.

    Raises:
        UserError: its class is unknown and cannot be found out, it cannot make pictures of that size, a LoRA is not of it, or a
            package is missing.
    """
    pipe = load_pipeline_folder(source, dtype, revision, variant, quantize, trusted)
    with quiet():
        fuse_loras(pipe, loras)
    pipe.to(device)
    family = family_of(pipe, size, frames)
    check_size(family)
    return family


def family_of(pipe: DiffusionPipeline, size: tuple[int, int] | None = None, frames: int | None = None) -> Family:
    """The family that is written for a pipeline's class, else one that is found out, with a notice.

    Raises:
        UserError: it cannot be found out.
    """
    kind = FAMILIES.get(type(pipe).__name__)
    if kind is not None:
        return kind(pipe, size, frames)
    family = probed(pipe, size, frames)
    print(notice(family))
    return family


def check_size(family: Family) -> None:
    """Raises UserError for a size or a number of frames that the autoencoder and the network cannot divide, and for frames of
    a picture."""
    (height, width), step = family.size, family.multiple
    if height % step or width % step:
        nearest = [max(step, round(edge / step) * step) for edge in family.size]
        raise UserError(
            f"data.resolution {height} x {width}: height and width of a {family.pipeline} must be multiples of {step}; "
            f"the nearest are {nearest}"
        )
    if family.frames is not None and type(family).frames is None:
        raise UserError(f"data.frames {family.frames}: a {family.pipeline} makes pictures; leave it out")
    if family.frames is not None and (family.frames - 1) % (every := family.frame_multiple):
        below = 1 + (family.frames - 1) // every * every
        raise UserError(
            f"data.frames {family.frames}: a {family.pipeline} makes 1 frame and then {every} at a time; "
            f"the nearest are {below} and {below + every}"
        )
