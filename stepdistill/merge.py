"""Several LoRA files in one: the weighted sum of what they add to each weight, exact, or compressed to a rank."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from . import __version__
from .errors import UserError
from .families.load import quiet
from .families.spellings import Layer, read_layers
from .files import beside
from .kohya import kohya_state
from .lora_sources import find_lora

Layers = Mapping[str, Layer]
SDXL_TEXT = 2048  # channels of the text that SDXL's network reads


def merge(
    sources: Sequence[str], out: Path, weights: Sequence[float] = (), rank: int | None = None, form: str = "diffusers"
) -> str:
    """Write the sum of LoRAs to `out`; returns what was done, in a line.

    Args:
        sources: files, and run or export folders, as name or name@scale; in diffusers' or kohya's spelling.
        weights: one for each, on top of its scale; none: 1.
        rank: compress every layer to it; None: the ranks add up, and nothing is lost.
        form: spelling of the result: diffusers or kohya.

    Raises:
        UserError: a source cannot be read, they are of different architectures, or `out` cannot be written.
    """
    weights = weights or [1.0] * len(sources)
    if len(weights) != len(sources):
        raise UserError(f"--weights has {len(weights)} numbers for {len(sources)} LoRAs; give one for each")
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out} must end in .safetensors")
    if out.exists():
        raise UserError(f"{out} exists and is not overwritten; give another name")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: {out.parent} is no folder; make it first: mkdir -p {out.parent}")
    parts, told = [], []
    for source, weight in zip(sources, weights, strict=True):
        try:
            lora = find_lora(source)
        except ValueError as error:
            raise UserError(str(error)) from None
        if lora.path is None:
            raise UserError(f"{lora.place} is a hub id; fetch it first: hf download {lora.place}, and give the file")
        with quiet():
            parts.append((read_layers(lora.path), lora.scale * weight))
        told.append({"file": lora.file, "weight": lora.scale * weight})
    check_alike([layers for layers, _ in parts], list(sources))
    exact = total(parts)
    merged = exact if rank is None else {name: compressed(layer, rank) for name, layer in exact.items()}
    lost = 0.0 if rank is None else relative_error(exact, merged)
    merged = padded(merged)
    about = {"stepdistill": __version__, "sources": told, "rank": rank, "relative_error": lost}
    with beside(out) as tmp:
        save_file(written(merged, form), tmp, {"format": "pt", "stepdistill.merge": json.dumps(about)})
    size = len(next(iter(merged.values())).down)
    how = "exact" if rank is None else f"compressed, relative error {lost:.2g}"
    return f"{out}: {len(parts)} LoRAs, {len(merged)} layers, rank {size}, {how}"


def check_alike(loras: Sequence[Layers], names: Sequence[str]) -> None:
    """Raises UserError for LoRAs of different architectures, with the first layers that tell."""
    first, name = loras[0], names[0]
    for other, its in zip(loras[1:], names[1:], strict=True):
        common = [layer for layer in first if layer in other]
        if not common:
            raise UserError(
                f"{name} and {its} have no layer in common ({next(iter(first))}, {next(iter(other))}): nothing says that they "
                f"are of one architecture; merge LoRAs of the same model"
            )
        for layer in common:
            a, b = shape(first[layer]), shape(other[layer])
            if a != b:
                raise UserError(
                    f"{name} and {its} are of different architectures: {layer} is {a} in one and {b} in the other; "
                    f"merge LoRAs of the same model"
                )
        first = {**first, **other}


def shape(layer: Layer) -> list[int]:
    """Of the weight that a layer's LoRA is added to."""
    return [len(layer.up), *layer.down.shape[1:]]


def total(parts: Sequence[tuple[Layers, float]]) -> dict[str, Layer]:
    """The sum of LoRAs, each times its weight: lower matrices one below the other, upper ones side by side."""
    found: dict[str, list[Layer]] = {}
    for layers, weight in parts:
        for name, layer in layers.items():
            found.setdefault(name, []).append(Layer(layer.down, weight * layer.up))
    return {name: Layer(*(torch.cat(x, dim) for dim, x in enumerate(zip(*some, strict=True)))) for name, some in found.items()}


def compressed(layer: Layer, rank: int) -> Layer:
    """The nearest LoRA of at most that rank, by the singular values of up @ down, its factor shared equally."""
    u, s, v = singular(layer)
    root = s[:rank].sqrt()
    down, up = root[:, None] * v[:, :rank].T, u[:, :rank] * root
    return Layer(down.reshape(-1, *layer.down.shape[1:]), up.reshape(*up.shape, *layer.up.shape[2:]))


def singular(layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    """u [out, r], s [r], v [in, r] with u diag(s) v^T = up @ down, through factors no larger than r x r."""
    (q_up, r_up), (q_down, r_down) = torch.linalg.qr(layer.up.flatten(1)), torch.linalg.qr(layer.down.flatten(1).T)
    u, s, vh = torch.linalg.svd(r_up @ r_down.T)
    return q_up @ u[:, : len(s)], s, q_down @ vh[: len(s)].T


def relative_error(exact: Layers, other: Layers) -> float:
    """The root mean square of what was lost over all layers, relative to what there was."""
    lost = sum(square(total([({name: layer}, 1.0), ({name: other[name]}, -1.0)])[name]) for name, layer in exact.items())
    return (lost / max(sum(map(square, exact.values())), 1e-38)) ** 0.5


def square(layer: Layer) -> float:
    """The sum of squares of up @ down."""
    return singular(layer)[1].double().square().sum().item()


def padded(layers: Layers) -> dict[str, Layer]:
    """All of the largest rank, with zeros: diffusers before 0.39 mistakes the scale of mixed ranks."""
    rank = max(len(layer.down) for layer in layers.values())
    return {name: Layer(grown(layer.down, 0, rank), grown(layer.up, 1, rank)) for name, layer in layers.items()}


def grown(x: Tensor, dim: int, size: int) -> Tensor:
    more = list(x.shape)
    more[dim] = size - x.shape[dim]
    return torch.cat([x, x.new_zeros(more)], dim).contiguous()


def written(layers: Layers, form: str) -> dict[str, Tensor]:
    """The tensors of a file in that spelling.

    Raises:
        UserError: kohya's, of what is no UNet: the other one is what ComfyUI reads of those.
    """
    state = {}
    for name, layer in layers.items():
        state |= {f"{name}.lora_A.weight": layer.down, f"{name}.lora_B.weight": layer.up}
    if form == "diffusers":
        return state
    wide = any(".attn2.to_k" in name and layer.down.shape[1] == SDXL_TEXT for name, layer in layers.items())
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te1_" if wide else "lora_te_", "text_encoder_2": "lora_te2_"}
    made, rank = {}, len(next(iter(layers.values())).down)
    for part in dict.fromkeys(name.partition(".")[0] for name in layers):
        if part not in prefixes:
            raise UserError(
                f"--format kohya: the layers of a {part} are read from diffusers' spelling everywhere; leave it out"
            )
        some = {key.removeprefix(f"{part}."): x for key, x in state.items() if key.startswith(f"{part}.")}
        made |= kohya_state(some, prefixes[part], rank)
    return made
