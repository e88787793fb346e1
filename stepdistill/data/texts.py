"""Prompts through a pipeline's text encoders: each once, however often it occurs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..families.base import Family
from ..show import Line
from .cache import Column, Entry, Store, fill, key_of

CHUNK = 64  # prompts encoded at a time
NULL = key_of("null prompt")


def encode_texts(family: Family, prompts: list[str]) -> dict[str, Tensor]:
    """What the network needs of each prompt, [N, ...], on the CPU; equal prompts are encoded once."""
    unique = list(dict.fromkeys(prompts))
    made = entries(family, unique)
    return {name: torch.stack([made[key_of(prompt)][name] for prompt in prompts]) for name in made[key_of(unique[0])]}


def entries(family: Family, prompts: list[str]) -> dict[str, Entry]:
    """Each prompt's tensors, on the CPU, by its key."""
    made = {}
    for i in range(0, len(prompts), CHUNK):
        some = prompts[i : i + CHUNK]
        encoded = {name: x.cpu() for name, x in family.encode_prompts(some).items()}
        made |= {key_of(prompt): {name: x[k].clone() for name, x in encoded.items()} for k, prompt in enumerate(some)}
    return made


def store_texts(
    family: Family, prompts: list[str], store: Store, dtype: torch.dtype, line: Line
) -> tuple[dict[str, Column], dict[str, Tensor] | None]:
    """What the network needs of each prompt, and of the null prompt [1, ...] (None: there is none), by way of a store.

    dtype: the network's, in which they are kept; it casts them to that anyway.
    """

    def encode(some: list[str]) -> dict[str, Entry]:
        return {key: kept(entry) for key, entry in entries(family, [said[key] for key in some]).items()}

    def kept(entry: Entry) -> Entry:
        return {name: x.to(dtype) if x.is_floating_point() else x for name, x in entry.items()}

    keys = [key_of(prompt) for prompt in prompts]
    said = dict(zip(keys, prompts, strict=True))
    if NULL not in store and (null := family.null_prompts()) is not None:
        store.add({NULL: kept({name: x[0].cpu() for name, x in null.items()})})
    fill(store, keys, encode, CHUNK, "prompts encoded", line)
    null = {name: store.read(NULL, name)[None] for name in store.names(NULL)} if NULL in store else None
    return {name: Column(store, keys, name) for name in store.names(keys[0])}, null


class Texts:
    """Some prompts and the null prompt, encoded beforehand: for them the encoders are needed no more. Others are encoded."""

    def __init__(self, family: Family, prompts: list[str] = ()):
        self.family, self.known = family, entries(family, list(dict.fromkeys(prompts)))
        self.null = family.null_prompts()

    def __call__(self, prompts: list[str]) -> dict[str, Tensor]:
        """What the network needs of each prompt, [N, ...], on the CPU."""
        if any(key_of(prompt) not in self.known for prompt in prompts):
            return encode_texts(self.family, prompts)
        rows = [self.known[key_of(prompt)] for prompt in prompts]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
