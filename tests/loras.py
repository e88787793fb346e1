"""LoRA files of somebody else's, for tiny networks: random, of any spelling, and what they add to each weight."""

from __future__ import annotations

import torch
from safetensors.torch import save_file

LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "ff.net.0.proj")


def style(net, prefix="unet", rank=3, seed=0, layers=LAYERS):
    """PEFT's spelling, as diffusers writes it: `<prefix>.<layer>.lora_A.weight` and `.lora_B.weight`."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for name, module in net.named_modules():
        if name.endswith(layers) and hasattr(module, "weight"):
            out, into, *kernel = module.weight.shape
            for which, shape in (("A", (rank, into, *kernel)), ("B", (out, rank, *(1 for _ in kernel)))):
                state[f"{prefix}.{name}.lora_{which}.weight"] = 0.3 * torch.randn(shape, generator=generator)
    return state


def save(state, file):
    save_file(state, file, {"format": "pt"})
    return file


def deltas(state):
    """What a LoRA in PEFT's spelling adds to the weight of each layer, `<prefix>.<layer>` -> tensor."""
    found = {}
    for key, down in state.items():
        if (layer := key.removesuffix(".lora_A.weight")) != key:
            up = state[f"{layer}.lora_B.weight"]
            found[layer] = (up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:])
    return found
