"""Pipelines without weights: architectures of known models and of folders on the meta device, where a tensor has a shape and
no memory."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from .architectures import Architecture, Part
from .families.load import check_files, quiet
from .foreign import read_json

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


def open_folder(folder: Path, dtype: torch.dtype = torch.float32) -> diffusers.DiffusionPipeline:
    """The pipeline of a folder by its own configs, on the meta device, with its tokenizers; no weights are read.

    Raises:
        OSError, ValueError: a config is missing or damaged, or names code of others.
    """
    check_files(str(folder), folder)
    index = read_json(folder / "model_index.json")
    kind = getattr(diffusers, index["_class_name"])
    parts = {name: value for name, value in index.items() if not name.startswith("_")}
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, value in parts.items():
            if isinstance(value, list):
                parts[name] = value[1] and read_part(folder / name, *value, dtype)
        return kind(**parts)


def read_part(folder: Path, library: str, name: str, dtype: torch.dtype) -> Any:
    """One part of such a pipeline: a model on the meta device, or a scheduler or tokenizer as it is."""
    kind = getattr(transformers if library == "transformers" else diffusers, name)
    if issubclass(kind, transformers.PreTrainedModel):
        with torch.device(HOST):
            made = kind(kind.config_class.from_pretrained(folder))
    elif issubclass(kind, diffusers.ModelMixin):
        with torch.device(HOST):
            made = kind.from_config(kind.load_config(folder))
    else:
        return kind.from_pretrained(folder)
    return made.to(dtype).eval().requires_grad_(False)
