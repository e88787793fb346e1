"""What a recipe asks of the machine that trains it, refused before any work if it is not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping

import torch
import torch.nn.functional as F

from . import distributed
from .errors import UserError
from .extras import require
from .sections import Recipe
from .trackers import check_trackers

COMPILERS = ("c++", "g++", "clang++", "cl")  # of C++, for train.compile


def check_machine(recipe: Recipe) -> None:
    """Raises UserError for a package, a key, a compiler or a type of numbers that this machine lacks, and see below."""
    check_launch(os.environ)
    if recipe.optim.optimizer == "adamw8bit":
        require("bitsandbytes", "optim.optimizer adamw8bit")
    if recipe.train.attention == "xformers":
        require("xformers", "train.attention xformers")
    check_trackers(recipe)
    if recipe.train.compile and not any(map(shutil.which, COMPILERS)):
        raise UserError("train.compile true needs a C++ compiler, and there is none; install g++, or set it to false")
    train, device, world = recipe.train, distributed.device(), distributed.world()
    if train.batch % (train.accumulate * world):
        parts, least = f"{world} processes and train.accumulate {train.accumulate}", train.accumulate * world
        raise UserError(
            f"train.batch {train.batch} cannot be divided among {parts}; set it to a multiple of {least}, as "
            f"{-(-train.batch // least) * least}"
        )
    precision = "bfloat16" if recipe.train.precision == "bf16" else "float32"
    for key, name in {"model.dtype": recipe.model.dtype, "train.precision": precision}.items():
        if lacks(device, getattr(torch, name)):
            remedy = "float32 (or float16 on a GPU)" if key == "model.dtype" else "no"
            raise UserError(f"{key} {name}: {device.type} of this machine does not compute in it; set {key} to {remedy}")


def check_launch(environment: Mapping[str, str]) -> None:
    """Raises UserError where accelerate was asked for several processes, and has started one, without a word."""
    if {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= environment.keys() and "WORLD_SIZE" not in environment:
        raise UserError(
            "accelerate launch was asked for several processes and started one, as it does with --cpu, and where it sees one "
            "GPU; give it --multi_gpu instead, on CPUs too, or take torchrun --nproc_per_node N -m stepdistill"
        )


def lacks(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device cannot convolve and multiply in a dtype, there and back; slow emulation on older GPUs counts as that."""
    if device.type == "cuda" and dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        return True
    try:
        x = torch.ones(1, 2, 4, 4, device=device, dtype=dtype, requires_grad=True)
        (F.conv2d(x, x.detach()) @ x.new_ones(1, 1)).sum().backward()
    except (RuntimeError, TypeError):
        return True
    return False
