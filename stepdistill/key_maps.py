"""Which layers of the known models wear a LoRA by default, written down: what a changed family or library would change.

    python -m stepdistill.key_maps    # writes architectures/keys/<model>.json anew

A map has a line for each kind of layer: "transformer_blocks.{0..18}.attn.to_q": [3072, 3072] stands for 19 linear layers, of
inputs and outputs; a convolution's [320, 640, 3, 3] are inputs, outputs and its kernel.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from .architectures import HERE, Architecture, known
from .families import FAMILIES
from .live_bytes import LiveBytes
from .meta import build_pipeline
from .roles import build_roles

KEYS = HERE / "keys"
Shape = tuple[int, ...]


def read_map(name: str) -> dict[str, Shape]:
    """A model's layers and their shapes, from its file."""
    packed = json.loads((KEYS / f"{name}.json").read_text(encoding="utf-8"))
    return {layer: tuple(shape) for pattern, shape in packed.items() for layer in expand(pattern)}


def find_layers(weights: Mapping[str, Shape]) -> dict[str, Shape]:
    """Layers and shapes from the shapes of a role's weights: lora_A [rank, inputs, *kernel], lora_B [outputs, rank, ...]."""
    found = {}
    for name, shape in weights.items():
        layer, which, _ = name.rsplit(".", 2)
        if which == "lora_A":
            outputs = weights[f"{layer}.lora_B.weight"][0]
            found[layer] = (shape[1], outputs, *shape[2:])
    return found


def role_weights(architecture: Architecture, rank: int = 1) -> dict[str, Shape]:
    """Shapes by name of what a student learns on a known model, by its family's default targets."""
    with LiveBytes():
        family = FAMILIES[architecture.pipeline](build_pipeline(architecture))
        student = build_roles(family, ("student",), rank).student
    return {name: tuple(p.shape) for name, p in student.named_parameters().items()}


def pack(layers: Mapping[str, Shape]) -> dict[str, Shape]:
    """Layers that differ only in numbers, and have one shape, in one line, if the numbers are a full grid; else each alone."""
    groups: dict[tuple[str, Shape], list[tuple[int, ...]]] = {}
    for layer, shape in layers.items():
        numbers = re.findall(r"(?<=\.)\d+(?=\.|$)", layer)
        groups.setdefault((re.sub(r"(?<=\.)\d+(?=\.|$)", "{}", layer), shape), []).append(tuple(map(int, numbers)))
    packed = {}
    for (form, shape), indices in groups.items():
        for block in blocks(sorted(indices)):
            axes = [sorted(set(axis)) for axis in zip(*block, strict=True)]
            packed[form.format(*(spell(axis) for axis in axes))] = shape
    return packed


def blocks(indices: list[tuple[int, ...]]) -> Iterable[list[tuple[int, ...]]]:
    """Cut sorted indices into full grids of neighbouring numbers: all, or by their first number, and so on."""
    axes = [sorted(set(axis)) for axis in zip(*indices, strict=True)]
    full = len(indices) == len(list(itertools.product(*axes)))
    if full and all(axis == list(range(axis[0], axis[-1] + 1)) for axis in axes):
        return [indices]
    split = next(n for n, axis in enumerate(axes) if len(axis) > 1)
    runs: list[list[tuple[int, ...]]] = []
    for _, some in itertools.groupby(sorted(indices, key=lambda i: i[split]), key=lambda i: i[split]):
        block = list(some)
        if runs and split == len(axes) - 1 and block[0][split] == runs[-1][-1][split] + 1:
            runs[-1] += block
        else:
            runs.append(block)
    return [part for run in runs for part in blocks(run)]


def spell(axis: list[int]) -> str:
    return str(axis[0]) if len(axis) == 1 else f"{{{axis[0]}..{axis[-1]}}}"


def expand(pattern: str) -> list[str]:
    """What a line of a map stands for."""
    parts = re.split(r"\{(\d+)\.\.(\d+)\}", pattern)
    ranges = [range(int(low), int(high) + 1) for low, high in zip(parts[1::3], parts[2::3], strict=True)]
    texts = parts[::3]
    return [
        "".join(text + number for text, number in zip(texts, [*map(str, numbers), ""], strict=True))
        for numbers in itertools.product(*ranges)
    ]


def write(folder: Path = KEYS) -> None:
    """Write the map of every known model that has a family."""
    folder.mkdir(exist_ok=True)
    for name, architecture in known().items():
        if architecture.pipeline in FAMILIES:
            packed = pack(find_layers(role_weights(architecture)))
            lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(shape)}" for key, shape in packed.items())
            (folder / f"{name}.json").write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    write()
