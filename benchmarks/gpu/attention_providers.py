"""Who computes attention and its derivative: this kernel, PyTorch's own means, and a rival where it can be imported."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from attention_cases import LARGE, Case, Inputs
from measure import Gpu, Host, Work, kernels
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

KERNEL, FLASH, COPY = "kernel", "flash forward", "copy"
MATH = ("math JVP", "math JVP, 16 bit")
RIVAL = ("jvp-flash-attention", "jvp-flash-attention, pointers")
Maker = Callable[[Case, Inputs], Work]  # a call of the work gives o and, if it is computed, `to`
WhyNot = Callable[[Case, Gpu | Host], str | None]  # why a case is left out, if it is


@dataclass(frozen=True)
class Provider:
    """One way to compute a case; products: the matrix products of what it computes, all that the case needs if None."""

    name: str
    make: Maker
    why_not: WhyNot
    products: int | None = None


def own(backend: str) -> Maker:
    def make(case: Case, x: Inputs) -> Work:
        *given, lens = x
        options = {"key_lens": lens, "causal": case.causal, "enable_gqa": case.kv != case.heads, "backend": backend}
        return lambda: kernels().attention_jvp(*given, **options)

    return make


def stock(backend: SDPBackend, case: Case, x: Inputs) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """PyTorch's attention by one of its backends."""
    options = {"attn_mask": x.key_mask(), "is_causal": case.causal, "enable_gqa": case.kv != case.heads}

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, **options)

    return attention


def forward(backend: SDPBackend) -> Maker:
    def make(case: Case, x: Inputs) -> Work:
        attention = stock(backend, case, x)
        return lambda: (attention(x.q, x.k, x.v),)

    return make


def dual(attention: Callable[[Tensor, Tensor, Tensor], Tensor], x: Inputs) -> tuple[Tensor, Tensor]:
    """By forward-mode differentiation."""
    with forward_ad.dual_level():
        pairs = zip(x[:3], x[3:6], strict=True)
        return tuple(forward_ad.unpack_dual(attention(*(t if d is None else forward_ad.make_dual(t, d) for t, d in pairs))))


def math_jvp(case: Case, x: Inputs) -> Work:
    attention = stock(SDPBackend.MATH, case, x)
    return lambda: dual(attention, x)


def math_jvp_16_bit(case: Case, x: Inputs) -> Work:
    """The same in the inputs' own precision; by default PyTorch computes it in float32."""
    attention, allow = stock(SDPBackend.MATH, case, x), torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp

    def work() -> tuple[Tensor, Tensor]:
        allow(True)
        try:
            return dual(attention, x)
        finally:
            allow(False)

    return work


def rival(**options: bool) -> Maker:
    """jvp-flash-attention from PyPI, called as its README says."""

    def make(case: Case, x: Inputs) -> Work:
        from jvp_flash_attention.jvp_attention import JVPAttn

        return lambda: dual(lambda q, k, v: JVPAttn.fwd_dual(q, k, v, causal=case.causal, **options), x)

    return make


def copy(case: Case, x: Inputs) -> Work:
    """As many bytes read and written as the derivative has to, and nothing else."""
    source = torch.empty(case.bytes // 2, dtype=torch.int8, device=x.q.device).random_()
    target = torch.empty_like(source)
    return lambda: (target.copy_(source),)


def room_for(bytes_each: int) -> WhyNot:
    def why_not(case: Case, on: Gpu | Host) -> str | None:
        if bytes_each == 2 and case.dtype == "float32":
            return "the inputs have 32 bits"
        need = 6 * bytes_each * case.batch * case.heads * case.queries * case.keys  # logits, weights, tangents, and between
        free = on.free()
        return f"needs about {need / 1e9:.0f} GB where {free / 1e9:.0f} GB are free" if need > 0.95 * free else None

    return why_not


def on_gpu(*rules: tuple[Callable[[Case], bool], str]) -> WhyNot:
    """On a GPU only, and not where one of these rules holds."""

    def why_not(case: Case, on: Gpu | Host) -> str | None:
        told = [reason for holds, reason in rules if holds(case)]
        return "needs a GPU" if on.dry else next(iter(told), None)

    return why_not


WIDE = (lambda case: case.dtype == "float32", "16 bit only")
MASKED = (lambda case: bool(case.lens), "takes no mask")
RIVAL_RULES = (
    (lambda case: importlib.util.find_spec("jvp_flash_attention") is None, "not installed"),
    (lambda case: case.tangents != "111", "absent tangents only as zeros, at the cost of all: see that row"),
    (lambda case: case.cross, "needs as many keys as queries"),
    (lambda case: case.queries % 32 != 0, "right only for multiples of 32 tokens"),
    (lambda case: case.dim not in (64, 128), "not at this head dimension"),
    (lambda case: bool(case.kv_heads), "no grouped queries"),
    (lambda case: bool(case.lens), "no mask but one of [B, H, N, N]"),
)
ELSEWHERE = (lambda case: case.name != LARGE.name, f"measured in the row {LARGE.name!r} only")


def providers(on: Gpu | Host) -> tuple[Provider, ...]:
    """In the order of the tables; in a dry run the reference stands in for the kernel."""
    ours = Provider("reference", own("reference"), lambda *_: None) if on.dry else Provider(KERNEL, own("triton"), on_gpu())
    return (
        ours,
        Provider(FLASH, forward(SDPBackend.FLASH_ATTENTION), on_gpu(WIDE, MASKED), products=2),
        Provider("cuDNN forward", forward(SDPBackend.CUDNN_ATTENTION), on_gpu(WIDE), products=2),
        Provider(COPY, copy, lambda case, on: None if case.cross else "where keys are few only", products=0),
        Provider(MATH[0], math_jvp, room_for(4)),
        Provider(MATH[1], math_jvp_16_bit, room_for(2)),
        Provider(RIVAL[0], rival(), on_gpu(*RIVAL_RULES)),
        Provider(RIVAL[1], rival(warp_specialize=False, USE_TMA=False), on_gpu(*RIVAL_RULES, ELSEWHERE)),
    )
