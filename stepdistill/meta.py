"""Pipelines without weights: real architectures on the meta device, where a tensor has a shape and no memory."""

from __future__ import annotations

import warnings
from typing import Any

import diffusers
import torch
import transformers

from .architectures import Architecture, Part
from .families.load import quiet

HOST = "meta"


def build_part(part: Part, dtype: torch.dtype = torch.float32) -> Any:
    """A model on the meta device, frozen and in evaluation mode, or a scheduler."""
    if hasattr(transformers, part.kind):
        kind = getattr(transformers, part.kind)
        with torch.device(HOST):
            made = kind(kind.config_class(**part.config))
    elif part.parameters:
        with torch.device(HOST):
            made = getattr(diffusers, part.kind)(**part.config)
    else:
        return getattr(diffusers, part.kind)(**part.config)
    return made.to(dtype).eval().requires_grad_(False)


def build_pipeline(architecture: Architecture, dtype: torch.dtype = torch.float32) -> diffusers.DiffusionPipeline:
    """The pipeline of a known model, on the meta device, without tokenizers."""
    kind = getattr(diffusers, architecture.pipeline)
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about safety checkers that nobody asked for
        parts = {name: build_part(part, dtype) for name, part in architecture.parts.items()}
        wanted = set(kind._get_signature_keys(kind)[0])
        return kind(**{name: None for name in wanted - parts.keys()}, **parts, **architecture.config)
