"""Attention of a family's networks by the kernels of xformers, all of it or none."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import UserError
from ..extras import require
from .base import Family


def use_xformers(family: Family) -> None:
    """Let every attention of the family's networks run in xformers.

    Raises:
        UserError: the package is not installed, there is no NVIDIA GPU, or some attention of this family cannot.
    """
    require("xformers", "train.attention xformers")
    for name in family.networks:
        net = getattr(family.pipe, name)
        if net.device.type != "cuda":
            raise UserError(
                f"train.attention xformers: it needs an NVIDIA GPU, and this is a {net.device.type}; set it to null"
            )
        if hasattr(net, "set_attn_processor"):
            net.enable_xformers_memory_efficient_attention()
        else:
            net.set_attention_backend("xformers")
        if left := sorted({type(m.processor).__name__ for m in net.modules() if hasattr(m, "processor") and not runs(m)}):
            raise UserError(
                f"train.attention xformers: the {type(net).__name__} of a {family.pipeline} computes attention in a way that "
                f"xformers cannot replace ({', '.join(left)}); set it to null"
            )


def runs(attention: nn.Module) -> bool:
    """Whether xformers computes this attention. diffusers leaves out processors that do not ask its dispatcher, silently."""
    processor: Any = attention.processor
    return "XFormers" in type(processor).__name__ or getattr(processor, "_attention_backend", None) == "xformers"
