"""Networks whose linear layers are frozen in 8 or 4 bits: int8 by torchao, nf4 by bitsandbytes, both through diffusers.

Each layer turns its weights back into the network's dtype before it multiplies, and its gradient goes through the very same
numbers, so what a LoRA learns over them is exact. Convolutions, norms and biases stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import BitsAndBytesConfig, PipelineQuantizationConfig, TorchAoConfig
from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer
from torch import nn

from ..extras import require

PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes"}
DENOISERS = ("unet", "transformer", "transformer_2")  # what pipelines call their networks; the second is another expert


def quantization(kind: str, dtype: torch.dtype) -> PipelineQuantizationConfig:
    """What from_pretrained of a pipeline wants as its quantization_config; dtype: in which the layers compute.

    Raises:
        UserError: the package that does it is not installed.
    """
    require(PACKAGES[kind], f"model.quantize {kind}")
    return PipelineQuantizationConfig(quant_mapping={name: config(kind, dtype) for name in DENOISERS})


def config(kind: str, dtype: torch.dtype) -> Any:
    """One network's."""
    if kind == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


class Anywhere(BnB4BitDiffusersQuantizer):
    """diffusers lets bitsandbytes work on GPUs alone; bitsandbytes itself works on CPUs too."""

    def validate_environment(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def update_device_map(self, device_map: Any) -> Any:
        return device_map or {"": "cpu"}


@contextmanager
def without_gpu() -> Iterator[None]:
    """Let diffusers quantize with bitsandbytes where there is no GPU."""
    before = AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"]
    if not torch.accelerator.is_available():
        AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] = Anywhere
    try:
        yield
    finally:
        AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] = before


def keep_gradients(net: nn.Module) -> None:
    """On CPUs with AVX-512 for bfloat16, bitsandbytes packs weights anew at the first call without gradient, and then lets no
    gradient through any later one, without a word."""
    for module in net.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
