"""A LoRA file in whatever spelling, read as the layers that diffusers names: its converters, without a pipeline."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import diffusers
from diffusers.utils.state_dict_utils import DIFFUSERS_OLD_TO_PEFT, convert_state_dict, convert_unet_state_dict_to_peft
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import UserError
from ..foreign import parse_json

KOHYA = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
SDXL = SimpleNamespace(layers_per_block=2)  # all that is asked of it, where blocks are numbered as in the first code
WORDS = {"lora_A": "down", "lora_B": "up"}


class Layer(NamedTuple):
    """What a LoRA adds to one layer's weight: up @ down, with the scale in it."""

    down: Tensor  # [r, in] or, of a convolution, [r, in, k, k]
    up: Tensor  # [out, r] or [out, r, 1, 1]


def read_layers(file: Path) -> dict[str, Layer]:
    """`<part of the pipeline>.<layer>` -> what is added to it, in float32; alphas are in the upper matrices.

    Raises:
        UserError: the file holds no LoRA, or one in a spelling that is not known here.
    """
    try:
        with safe_open(file, "pt") as opened:
            state = {key: opened.get_tensor(key).float() for key in opened.keys()}  # noqa: SIM118 - it is no mapping
            adapter = parse_json((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{file} is no safetensors file ({error}); give a LoRA as diffusers or sd-scripts write it") from None
    if strange := [key for key in state if "lora_" not in key and not key.endswith(".alpha")]:
        raise UserError(f"{file} holds {strange[0]}, which is no LoRA's; only plain LoRAs can be read (no DoRA, no LoKr)")
    if any(key.endswith("dora_scale") or "magnitude" in key for key in state):
        raise UserError(f"{file} is a DoRA, and only plain LoRAs can be read")
    try:
        state = to_peft(with_scale(state, adapter))
    except (ValueError, AssertionError, LookupError, AttributeError, TypeError, RuntimeError) as error:
        why = next(iter(str(error).strip().splitlines()), "")[:300] or type(error).__name__
        raise UserError(f"{file} is in a spelling that diffusers cannot read ({why})") from None
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, x in state.items():
        layer, _, which = key.removesuffix(".weight").rpartition(".")
        pairs.setdefault(spelt(layer), {})[WORDS.get(which, which)] = x
    if odd := [layer for layer, pair in pairs.items() if pair.keys() != {"down", "up"} or "." not in layer]:
        raise UserError(f"{file} is in a spelling that is not known ({odd[0]}); give a file of diffusers' or of sd-scripts'")
    return {layer: Layer(**pair) for layer, pair in pairs.items()}


def with_scale(state: dict[str, Tensor], adapter: dict) -> dict[str, Tensor]:
    """The tensors without alphas, alpha / rank multiplied into the upper matrices; adapter: PEFT's configuration, if any."""
    ends = {".lora_up.weight": ".lora_down.weight", ".lora_B.weight": ".lora_A.weight"}
    scaled = {key: x for key, x in state.items() if not key.endswith(".alpha")}
    for key in scaled:
        for up, down in ends.items():
            if (layer := key.removesuffix(up)) != key:
                rank = len(scaled[layer + down])
                alpha = state.get(f"{layer}.alpha")
                alpha = alpha_of(adapter, layer) if alpha is None else alpha.item()
                scaled[key] = scaled[key] * (rank if alpha is None else alpha) / rank
    return scaled


def alpha_of(adapter: dict, layer: str) -> float | None:
    """What PEFT's configuration, prefixed with the part of the pipeline, says of a layer; None: nothing."""
    part, _, name = layer.partition(".")
    patterns = adapter.get(f"{part}.alpha_pattern") or {}
    special = next((alpha for pattern, alpha in patterns.items() if name.endswith(pattern.lstrip("^"))), None)
    return adapter.get(f"{part}.lora_alpha") if special is None else special


def to_peft(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Kohya's spelling and diffusers' old ones in PEFT's, prefixed with the part of the pipeline."""
    if all(key.startswith(KOHYA) for key in state):
        if any("_blocks_" in key and key.startswith(("lora_unet_double", "lora_unet_single")) for key in state):
            state = diffusers.FluxPipeline.lora_state_dict(state)
            return {key if key.startswith(("transformer.", "text_")) else f"transformer.{key}": x for key, x in state.items()}
        state = diffusers.StableDiffusionXLPipeline.lora_state_dict(state, unet_config=SDXL)[0]
    text = {key: x for key, x in state.items() if key.startswith("text_encoder")}
    return convert_unet_state_dict_to_peft({key: x for key, x in state.items() if key not in text}) | convert_state_dict(
        text, DIFFUSERS_OLD_TO_PEFT
    )


def spelt(layer: str) -> str:
    """One name for layers of text encoders, which transformers 5 calls otherwise than its elders."""
    part, _, name = layer.partition(".")
    return f"{part}.text_model.{name}" if part.startswith("text_encoder") and name.startswith("encoder.") else layer
