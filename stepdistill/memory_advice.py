"""Memory that ran out, told as what to lower, in order, with the estimated gain."""

from __future__ import annotations

import errno
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .errors import UserError
from .plan import make_plan
from .recipe import Recipe

SAID = ("can't allocate memory", "CUDA error: out of memory", "ALLOC_FAILED", "bad allocation")  # by allocators and cuBLAS
HELPS = {  # phase: the options of a plan that help in it
    "encoding": ("model.dtype", "model.quantize"),
    "making pairs": ("pairs.batch", "model.dtype", "model.quantize"),
    "training": ("train.", "model.", "optim.", "lora."),
    "sampling": ("eval.batch", "model.dtype", "model.quantize"),
    "evaluation": ("eval.batch", "model.dtype", "model.quantize"),
}


def ran_out(error: BaseException) -> bool:
    """Whether an error says that there was not enough memory, of a GPU or of the machine."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    told = isinstance(error, RuntimeError) and any(words in str(error) for words in SAID)
    return told or isinstance(error, MemoryError | torch.OutOfMemoryError)


@contextmanager
def memory(phase: str, recipe: Recipe) -> Iterator[None]:
    """Around a phase of HELPS.

    Raises:
        UserError: its memory ran out; what saves some, cheapest first.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not ran_out(error):
            raise
        reason = told(error)
        traceback.clear_frames(error.__traceback__)  # they hold what filled the memory
    else:
        return
    raise UserError(f"out of memory in {phase} ({reason}). {remedies(phase, recipe)}")


def told(error: BaseException) -> str:
    """The first sentence of an error, whose rest is an allocator's."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split(". ")[0].rstrip(".")


def remedies(phase: str, recipe: Recipe) -> str:
    """What saves memory in a phase, what costs least first, and the estimated gain of each alone."""
    found = [f"{key} ({size_of(gain)})" for key, gain in options(recipe) if key.startswith(HELPS[phase]) and gain > 0]
    found = (["pairs.batch=1"] if phase == "making pairs" and recipe.pairs.batch > 1 else []) + found
    found.append("a smaller data.resolution" if recipe.data.resolution is None else "a data.resolution below its own")
    return f"What saves memory, what costs least first, each alone by estimate: {', '.join(found)}"


def options(recipe: Recipe) -> list[tuple[str, int]]:
    """Those of the plan; none of a model that cannot be planned, or where even that takes more memory than is left."""
    try:
        return make_plan(recipe).options
    except (UserError, MemoryError, RuntimeError, OSError):
        return []


def size_of(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{max(size / 1e6, 0.1):,.1f} MB"
