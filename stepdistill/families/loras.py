"""LoRAs that people have, on stock pipelines: loaded whole or refused, and fused below all that is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from ..errors import UserError
from ..lora_sources import LoraSource

PROBE = "user"  # name of an adapter while it is being fused


def fuse_loras(pipe: Any, loras: Sequence[LoraSource]) -> None:
    """Add LoRAs to the weights of a stock pipeline, each at its scale, one after the other.

    Raises:
        UserError: one that cannot be read, that is of another architecture, or of which a part finds no place.
    """
    for lora in loras:
        parts = load_whole(pipe, lora)
        pipe.fuse_lora(components=parts, lora_scale=lora.scale)
        pipe.unload_lora_weights()


def load_whole(pipe: Any, lora: LoraSource, adapter: str = PROBE) -> list[str]:
    """pipe.load_lora_weights, which may leave out layers without a word, or raise what only its authors understand.

    Returns the parts of the pipeline, by name, that wear it.

    Raises:
        UserError: see `fuse_loras`.
    """
    kind = type(pipe).__name__
    if not hasattr(pipe, "load_lora_weights"):
        raise UserError(f"{lora}: diffusers' {kind} loads no LoRAs; leave model.loras out, or give a model it is fused into")
    if getattr(pipe, "transformer_2", None) is not None:
        raise UserError(
            f"{lora}: this {kind} has two experts, and diffusers puts a LoRA on the first alone; fuse it into both "
            f"(load_into_transformer_2=True), save the pipeline, and give that as model.source"
        )
    try:
        state = read_lora(pipe, lora)
        pipe.load_lora_weights(lora.place, weight_name=lora.file, adapter_name=adapter, use_safetensors=True)
    except (
        ValueError,
        RuntimeError,
        LookupError,
        AttributeError,
        TypeError,
        AssertionError,
        OSError,
        SafetensorError,
    ) as error:
        why = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise UserError(f"{lora} is no LoRA of this {kind} ({why[:300]}); give one made for this architecture") from None
    worn = {name: adapted(part, adapter) for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    found, layers = sum(map(len, worn.values())), layers_of(state)
    if not found or found != len(layers):
        left = [layer for layer in layers if not any(layer.endswith(name) for names in worn.values() for name in names)]
        lost = f"{len(layers) - found} of its {len(layers)} layers fit nothing, the first is {(left or layers or ['?'])[0]}"
        raise UserError(f"{lora} is no LoRA of this {kind}: {lost}; give one made for this architecture")
    return [name for name, layers in worn.items() if layers]


def load_kohya(pipe: Any, folder: Path, weight_name: str, adapter_name: str | None = None, **options: Any) -> None:
    """pipe.load_lora_weights of a file in kohya's spelling, without a loss: what lies outside FLUX.1's blocks diffusers 0.42
    converts, but without the name of its part, and then leaves it out."""
    source: Any = folder / weight_name
    if hasattr(pipe, "transformer"):
        state = pipe.lora_state_dict(folder, weight_name=weight_name, **options)
        source = {key if key.startswith("transformer.") else f"transformer.{key}": x for key, x in state.items()}
    pipe.load_lora_weights(source, adapter_name=adapter_name, **options)


def read_lora(pipe: Any, lora: LoraSource) -> dict[str, Tensor]:
    """The tensors of a LoRA file under the names that diffusers gives them."""
    config = {"unet_config": pipe.unet.config} if hasattr(pipe, "unet") else {}  # sd-scripts numbers SDXL's blocks otherwise
    read = pipe.lora_state_dict(lora.place, weight_name=lora.file, use_safetensors=True, **config)
    return read[0] if isinstance(read, tuple) else read


def layers_of(state: dict[str, Tensor]) -> list[str]:
    """The layers that a LoRA's tensors are of, by the first of each layer's two tensors, in any of diffusers' spellings."""
    ends = (".lora_A.weight", ".lora.down.weight", "_lora.down.weight", ".lora_linear_layer.down.weight", ".lora_down.weight")
    return [key.removesuffix(end) for key in state for end in ends[:] if key.endswith(end)]


def adapted(part: nn.Module, adapter: str) -> list[str]:
    """The layers of a part that wear an adapter."""
    return [name for name, module in part.named_modules() if adapter in getattr(module, "lora_A", ())]
