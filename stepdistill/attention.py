"""Exact Jacobian-vector products through unmodified networks: attention that forward-mode AD can cross, and `jvp`.

PyTorch's fused attention has no forward derivative (pytorch#98164). So, while a derivative is taken, calls of
F.scaled_dot_product_attention are answered by `attention`, the same function in operations that have one; and F.group_norm,
whose derivative knows one memory layout only, is handed that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

BACKENDS = ("auto", "kernel", "reference")


@torch.no_grad()
def jvp(
    fn: Callable[..., Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor | None], attention: str = "auto"
) -> tuple[Tensor, Tensor]:
    """fn(*primals), and its derivative along the tangents (None: zero), both without a gradient.

    Args:
        fn: tensors to one tensor; what it reads besides has no tangent.
        primals, tangents: of the same shapes and dtypes.
        attention: "reference", the written-out mathematics, whose memory grows with the square of the tokens; "kernel", one
            fused pass; "auto", the kernel where there is one for this device, otherwise the reference.

    Raises:
        ValueError: attention is something else, or "kernel" where there is none.
        RuntimeError: fn has no forward derivative, or its result does not depend on what has a tangent.
    """
    if attention not in BACKENDS:
        raise ValueError(f"attention {attention!r} is not one of {', '.join(BACKENDS)}")
    if attention == "kernel":
        raise ValueError("attention 'kernel': there is no fused kernel yet; use 'auto' or 'reference'")
    with forward_ad.dual_level(), _Intercepted():
        duals = [x if v is None else forward_ad.make_dual(x, v) for x, v in zip(primals, tangents, strict=True)]
        try:
            value, tangent = forward_ad.unpack_dual(fn(*duals))
        except NotImplementedError as error:  # "Trying to use forward AD with ... that does not support it"
            raise RuntimeError(f"this network has no exact derivative ({error}); take finite differences instead") from None
    if tangent is None:
        raise RuntimeError("the derivative was lost on its way through the network; take finite differences instead")
    return value, tangent


class _Intercepted(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return INSTEAD.get(function, function)(*args, **kwargs or {})


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(scale Q K^T + mask) V, computed in at least float32; the signature of F.scaled_dot_product_attention.

    Shapes: query [..., H, N, D], key [..., H, M, D], value [..., H, M, E], result [..., H, N, E]. A query that the mask
    leaves no key gets zeros.

    Raises:
        ValueError: dropout_p is not 0: two passes of one network would not be of one function.
    """
    if dropout_p:
        raise ValueError(f"attention with dropout {dropout_p} has no derivative; put the network in evaluation mode")
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        q, k, v = (x.to(dtype) for x in (query, key, value))
        if enable_gqa:
            k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
        logits = q @ k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril()
        if attn_mask is None:
            return (logits.softmax(-1) @ v).to(query.dtype)
        if attn_mask.dtype != torch.bool:
            return ((logits + attn_mask).softmax(-1) @ v).to(query.dtype)
        weights = logits.masked_fill(~attn_mask, -math.inf).softmax(-1)
        return (weights.masked_fill(~attn_mask.any(-1, keepdim=True), 0) @ v).to(query.dtype)


def group_norm(x: Tensor, *args, **kwargs) -> Tensor:
    """F.group_norm, whose forward derivative takes no channels-last input."""
    return F.group_norm(x.contiguous(), *args, **kwargs)


INSTEAD = {F.scaled_dot_product_attention: attention, F.group_norm: group_norm}
