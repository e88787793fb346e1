"""LoRA weights in kohya's spelling, which ComfyUI, A1111, Forge and sd-scripts read: the layers of each model's first code.

Where that code has one layer for several of diffusers' (FLUX.1's q, k and v), their LoRAs of rank r become one of rank n r:
A's one below the other, B's as blocks of a diagonal, so that every output has its own LoRA alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Layers = dict[str, tuple[str, ...]]  # layer in kohya's files: the network's layers whose outputs it has, one below the other

FLUX_DOUBLE = {
    **{"img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"), "img_attn.proj": ("attn.to_out.0",)},
    **{"txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "txt_attn.proj": ("attn.to_add_out",)},
    **{"img_mlp.0": ("ff.net.0.proj",), "img_mlp.2": ("ff.net.2",)},
    **{"txt_mlp.0": ("ff_context.net.0.proj",), "txt_mlp.2": ("ff_context.net.2",)},
    **{"img_mod.lin": ("norm1.linear",), "txt_mod.lin": ("norm1_context.linear",)},
}
FLUX_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    **{"linear2": ("proj_out",), "modulation.lin": ("norm.linear",)},
}
FLUX_REST = {
    **{"img_in": ("x_embedder",), "txt_in": ("context_embedder",)},
    **{"final_layer.linear": ("proj_out",), "final_layer.adaLN_modulation.1": ("norm_out.linear",)},
    **{
        f"{theirs}_in.{end}_layer": (f"time_text_embed.{ours}_embedder.linear_{n}",)
        for theirs, ours in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance"))
        for n, end in ((1, "in"), (2, "out"))
    },
}
SWAPPED = ("final_layer.adaLN_modulation.1",)  # the first code makes shift and scale of it, diffusers scale and shift


def flux_layers(double: int, single: int) -> Layers:
    """FLUX.1's, for so many blocks of each kind."""
    found = dict(FLUX_REST)
    for theirs, ours, count, block in (
        ("double_blocks", "transformer_blocks", double, FLUX_DOUBLE),
        ("single_blocks", "single_transformer_blocks", single, FLUX_SINGLE),
    ):
        for i in range(count):
            found |= {f"{theirs}.{i}.{key}": tuple(f"{ours}.{i}.{part}" for part in parts) for key, parts in block.items()}
    return found


def kohya_state(
    weights: Mapping[str, Tensor],
    prefix: str,
    alpha: float,
    layers: Layers | None = None,
    outputs: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """`<prefix><layer with underscores>.lora_down.weight`, `.lora_up.weight`, `.alpha`; float32, convolutions stay 4-D.

    weights: by name in the network, as `Denoiser.named_parameters` gives them; layers: None: named as in the network;
    outputs: channels of each layer of the network, needed where layers are joined.

    Raises:
        ValueError: kohya's files have no place for some of the weights.
    """
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, x in weights.items():
        layer, which = name.removesuffix(".weight").rsplit(".", 1)
        pairs.setdefault(layer, {})[which] = x.detach().to("cpu", torch.float32)
    layers = {layer: (layer,) for layer in pairs} if layers is None else layers
    if lost := pairs.keys() - {part for parts in layers.values() for part in parts}:
        raise ValueError(f"kohya's files have no place for {', '.join(sorted(lost))}")
    state = {}
    for layer, parts in layers.items():
        if not any(part in pairs for part in parts):
            continue
        down, up = joined([pairs.get(part) for part in parts], [outputs[part] for part in parts] if len(parts) > 1 else [])
        if layer in SWAPPED:
            up = torch.cat(up.chunk(2)[::-1])
        key = prefix + layer.replace(".", "_")
        state |= {f"{key}.lora_down.weight": down.contiguous(), f"{key}.lora_up.weight": up.contiguous()}
        state[f"{key}.alpha"] = torch.tensor(float(alpha) * len(parts))  # the scale is alpha / rank, and stays what it was
    return state


def joined(parts: Sequence[dict[str, Tensor] | None], outputs: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The LoRAs of several layers with the same input, as one of the layer that has all their outputs; None: no LoRA.

    parts: of each lora_A [r, in] and lora_B [out, r]; returns down [n r, in], up [sum of out, n r].
    """
    if len(parts) == 1:
        return parts[0]["lora_A"], parts[0]["lora_B"]
    like = next(part for part in parts if part)
    none = torch.zeros_like(like["lora_A"])
    blocks = [part["lora_B"] if part else none.new_zeros(out, len(none)) for part, out in zip(parts, outputs, strict=True)]
    return torch.cat([part["lora_A"] if part else none for part in parts]), torch.block_diag(*blocks)
