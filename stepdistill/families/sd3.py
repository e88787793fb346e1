"""Stable Diffusion 3 and 3.5: StableDiffusion3Pipeline, a rectified-flow transformer."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .base import Family

T5_TOKENS = 256  # what the pipeline's max_sequence_length defaults to


class SD3(Family):
    """Without a T5 encoder (or with one that says nothing) the pipeline appends 256 zero tokens to every prompt. They have no
    positions, so they stay equal to each other in every block: one of them, counted 256 times in the attention, gives the
    same output for a third of the work (see `CountedAttention`, which the family sets on the pipeline's network: compare
    with a stock pipeline that was loaded anew)."""

    pipeline = "StableDiffusion3Pipeline"
    comfyui_shifter = "ModelSamplingSD3"
    lora_targets = (  # with the layers that a time modulates, as in LCM-LoRA's of a UNet: a student is asked at few times
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
        *("norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out"),
    )

    def __init__(self, pipe, size=None, frames=None):
        super().__init__(pipe, size, frames)
        self.text_tokens = T5_TOKENS
        t5 = pipe.text_encoder_3
        silent = t5 is None or not t5.encoder.final_layer_norm.weight.any()
        if silent and not self.net.config.dual_attention_layers:
            self.text_tokens = 1
            self.net.set_attn_processor(CountedAttention(T5_TOKENS))

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        for_t5 = [""] * len(prompts) if self.text_tokens == 1 else None  # None: the same prompts
        text, _, pooled, _ = self.pipe.encode_prompt(
            prompts, None, for_t5, do_classifier_free_guidance=False, max_sequence_length=self.text_tokens
        )
        return {"text": text, "pooled": pooled}

    def forward(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        text, pooled = cond["text"].to(net.dtype), cond["pooled"].to(net.dtype)
        return net(x_t.to(net.dtype), text, pooled, self.timestep(t)).sample

    def feature_tokens(self, out: tuple[Tensor, Tensor], x_t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return out[1]  # a block returns (text, picture) tokens


class CountedAttention:
    """diffusers' joint attention in which the last key counts `times` times: its logits grow by log(times)."""

    def __init__(self, times: int):
        from diffusers.models.attention_processor import JointAttnProcessor2_0

        self.inner, self.bias = JointAttnProcessor2_0(), math.log(times)

    def __call__(self, attn, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **kwargs):
        with _LastKeyBias(self.bias):
            return self.inner(attn, hidden_states, encoder_hidden_states, **kwargs)


class _LastKeyBias(TorchFunctionMode):
    def __init__(self, bias: float):
        super().__init__()
        self.bias = bias

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            query, key = args[:2]
            mask = query.new_zeros(1, 1, 1, key.shape[-2])
            mask[..., -1] = self.bias
            kwargs = kwargs | {"attn_mask": mask.expand(1, 1, query.shape[-2], -1)}
        return function(*args, **kwargs)
