"""LoRA weights as other programs name them: pure functions from named tensors to named tensors and file headers.

Rules and the failures behind them: the prefixed PEFT keys are what diffusers loads, unmixed with any other spelling (a
mixed file silently loses modules, diffusers issue 14548); alpha equals rank, which every loader assumes when it is told
nothing, so the diffusers file needs neither alphas nor adapter metadata, whose fields older peft versions refuse.
Weights stay float32, as trained: loaders cast them to the network's type, and fp16 would round small ones to zero.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from safetensors.torch import save
from torch import Tensor

from .sidecar import Serving

BASES = {  # by width of their text, as ModelSpec and sd-scripts call them
    768: ("stable-diffusion-v1", "sd_v1"),
    1024: ("stable-diffusion-v2-512", "sd_v2"),
    2048: ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
    4096: ("flux-1-dev", "flux1"),
}


def peft_state(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """`<prefix>.<module>.lora_A.weight` and `.lora_B.weight`, float32 on the CPU; any shapes.

    weights: by name in the network, as `Denoiser.named_parameters` gives them.
    """
    return {f"{prefix}.{name}": x.detach().to("cpu", torch.float32).contiguous() for name, x in weights.items()}


def network_state(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """What `peft_state` was given."""
    return {name.removeprefix(f"{prefix}."): x for name, x in state.items()}


def kohya_header(state: Mapping[str, Tensor], told: Serving, text_width: int, kind: str) -> dict[str, str]:
    """ModelSpec and sd-scripts fields. The base is named only where the width of its text tells it.

    text_width: channels of the prompt as the network reads it; kind: what the network predicts.
    """
    data = save(dict(state))
    words = ", ".join(f"{key} {value}" for key, value in (told.sampler.comfyui or {"cfg": 1.0}).items())
    header = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.implementation": "diffusers",
        "modelspec.title": told.name,
        "modelspec.resolution": "{1}x{0}".format(*told.size),
        "modelspec.usage_hint": f"{told.steps} steps, {words}; negative prompts have no effect",
        "modelspec.prediction_type": {"eps": "epsilon"}.get(kind, kind),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(told.lora["rank"]),
        "ss_network_alpha": str(told.lora["alpha"]),
        "sshs_model_hash": hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest(),  # tensors alone
    }
    if text_width in BASES:
        architecture, version = BASES[text_width]
        header |= {"modelspec.architecture": f"{architecture}/lora", "ss_base_model_version": version}
    return header
