"""attention_jvp: softmax attention and its Jacobian-vector product in one pass, as an operator that PyTorch can compile."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference

BACKENDS = ("auto", "triton", "reference")


def attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None = None,
    tk: Tensor | None = None,
    tv: Tensor | None = None,
    *,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    key_lens: Tensor | None = None,
    causal: bool = False,
    enable_gqa: bool = False,
    out_dtype: torch.dtype | None = None,
    return_stats: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """o = softmax(scale q k^T + mask) v, and its derivative `to` along tangents; absent ones are zero, and cost nothing.

    o has a gradient with respect to q, k and v (that of PyTorch's own attention); `to` and a mask have none. With S the logits,
    P = softmax(S) and tS = scale (tq k^T + q tk^T): to = P tv + P (tS - mu) v, where mu = rowsum(P tS) (reference.py).

    Args:
        q: [B, H, Nq, D]; any strides.
        k, v: [B, Hk, Nk, D] and [B, Hk, Nk, Dv]; Hk is H, or with enable_gqa a divisor of it.
        tq, tk, tv: tangents, of the shapes and the dtype of q, k and v.
        scale: of the logits; 1 / sqrt(D) by default.
        attn_mask: broadcast to [B, H, Nq, Nk]; boolean (True: this query sees this key), or added to the logits.
        key_lens: [B], integers: how many keys, from the first, count; what lies beyond is never looked at.
        causal: query i sees keys 0 to i.
        out_dtype: of o and `to`; q's by default. torch.float32 for parts that are to be merged.
        return_stats: also return lse [B, H, Nq], the logarithm of each row's sum of exponentials, and mu, its derivative along
            the tangents, both in at least float32: what `merge` needs.
        backend: "triton", the fused kernel, for CUDA; "reference", plain PyTorch; "auto", the kernel where it can, otherwise
            the reference, with a warning if the tensors are on a GPU.

    Returns:
        o, to [B, H, Nq, Dv] (and lse, mu). Where no key counts, o and `to` are 0 and lse is -inf.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; attn_mask requires a gradient; or backend is "triton" and the kernel
            cannot compute this.
        RuntimeError: in the backward pass, a gradient arrives at `to`, lse or mu.
    """
    _check(q, k, v, tq, tk, tv, attn_mask, key_lens, enable_gqa, backend)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    o, to, lse, mu = _operator(q, k, v, tq, tk, tv, attn_mask, key_lens, scale, causal, out_dtype or q.dtype, backend)
    return (o, to, lse, mu) if return_stats else (o, to)


def merge(parts: Iterable[tuple[Tensor, Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention over all keys from (o, to, lse, mu) over disjoint parts of them, in any order: split keys, ring attention.

    With w = exp(lse_part - lse): mu = sum w mu_part, and to = sum w (to_part + (mu_part - mu) o_part). Shapes as of
    attention_jvp(..., return_stats=True): o and to [B, H, Nq, Dv], lse and mu [B, H, Nq].
    """
    o, to, lse, mu = (torch.stack(x) for x in zip(*parts, strict=True))
    whole = lse.logsumexp(0)
    w = torch.where(whole == -math.inf, 0, (lse - whole).exp())
    mean = (w * mu).sum(0)
    w, apart = w[..., None], (mu - mean)[..., None]
    return (w * o).sum(0).to(o.dtype), (w * (to + apart * o)).sum(0).to(to.dtype), whole, mean


def _check(q, k, v, tq, tk, tv, attn_mask, key_lens, enable_gqa, backend) -> None:
    def shape(x: Tensor) -> list[int]:
        return list(x.shape)

    def rule(holds: bool, told: str) -> None:
        if not holds:
            raise ValueError(f"attention_jvp: {told}")

    rule(backend in BACKENDS, f"backend {backend!r} is not one of {', '.join(BACKENDS)}")
    rule(q.ndim == k.ndim == v.ndim == 4, f"q, k and v are [B, H, N, D], not {shape(q)}, {shape(k)} and {shape(v)}")
    rule(q.is_floating_point(), f"q, k and v are floating-point numbers, not {q.dtype}")
    for name, x in {"k": k, "v": v, "tq": tq, "tk": tk, "tv": tv}.items():
        if x is not None:
            rule(x.dtype == q.dtype and x.device == q.device, f"{name} is {x.dtype} on {x.device}, q {q.dtype} on {q.device}")
    fits = q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3] and k.shape[:3] == v.shape[:3] and k.shape[1] > 0
    rule(fits, f"q {shape(q)}, k {shape(k)} and v {shape(v)} do not fit: [B, H, Nq, D], [B, Hk, Nk, D], [B, Hk, Nk, Dv]")
    for name, x, of in (("tq", tq, q), ("tk", tk, k), ("tv", tv, v)):
        rule(
            x is None or x.shape == of.shape,
            f"{name} {shape(x) if x is not None else ''} has not the shape {shape(of)} of {name[1]}",
        )
    heads, kv_heads = q.shape[1], k.shape[1]
    rule(
        heads == kv_heads or (enable_gqa and heads % kv_heads == 0),
        f"{heads} heads of q and {kv_heads} of k are not the same number, nor with enable_gqa a multiple",
    )
    logits = (q.shape[0], heads, q.shape[2], k.shape[2])
    if attn_mask is not None:
        fits = attn_mask.ndim <= 4 and all(n in (1, m) for n, m in zip(attn_mask.shape[::-1], logits[::-1], strict=False))
        rule(fits, f"attn_mask {shape(attn_mask)} cannot be broadcast to {list(logits)}")
        rule(
            attn_mask.dtype == torch.bool or attn_mask.is_floating_point(),
            f"attn_mask is boolean or added, not {attn_mask.dtype}",
        )
        rule(attn_mask.device == q.device, f"attn_mask is on {attn_mask.device}, q on {q.device}")
        learnt = attn_mask.requires_grad and torch.is_grad_enabled()
        rule(not learnt, "attn_mask requires a gradient, and there is none for it: detach it")
    if key_lens is not None:
        rule(
            key_lens.shape == q.shape[:1] and not key_lens.is_floating_point() and key_lens.device == q.device,
            f"key_lens is [{q.shape[0]}] integers on {q.device}, not {shape(key_lens)} {key_lens.dtype} on {key_lens.device}",
        )


def like_queries(q: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Empty [B, H, Nq, width]; tokens before heads in memory where q has them so, and joining the heads copies nothing."""
    b, h, n, _ = q.shape
    if q.stride(1) < q.stride(2):
        return q.new_empty(b, n, h, width, dtype=dtype).transpose(1, 2)
    return q.new_empty(b, h, n, width, dtype=dtype)


@torch.library.custom_op("stepdistill::attention_jvp", mutates_args=())
def _operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    attn_mask: Tensor | None,
    key_lens: Tensor | None,
    scale: float,
    causal: bool,
    out_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if attn_mask is not None:
        attn_mask = attn_mask.reshape((1,) * (4 - attn_mask.ndim) + attn_mask.shape)
    given = (q, k, v, tq, tk, tv, attn_mask, key_lens, scale, causal)
    o, to = (like_queries(q, v.shape[-1], out_dtype) for _ in range(2))
    if fused(q, k, v, scale, backend):
        from . import launch

        return o, to, *launch.forward(*given, o, to)
    with torch.autocast(q.device.type, enabled=False):
        exact_o, exact_to, lse, mu = reference.attention_jvp(*given)
    return o.copy_(exact_o), to.copy_(exact_to), lse, mu


def fused(q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str) -> bool:
    """Whether the fused kernel computes this.

    Raises:
        ValueError: backend is "triton", and it cannot.
    """
    if backend == "reference" or (backend == "auto" and q.device.type == "cpu"):
        return False
    try:
        from . import launch

        why = launch.unable(q, k, v, scale)
    except ImportError:
        why = "Triton is not installed: pip install triton"
    if why and backend == "triton":
        raise ValueError(f"attention_jvp: the fused kernel cannot compute this: {why}")
    if why:
        warnings.warn(f"attention_jvp by plain PyTorch, not by the fused kernel: {why}", stacklevel=2)
    return not why


@_operator.register_fake
def _(q, k, v, tq, tk, tv, attn_mask, key_lens, scale, causal, out_dtype, backend):
    o, to = (like_queries(q, v.shape[-1], out_dtype) for _ in range(2))
    row = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    return o, to, row, torch.empty_like(row)


def _save(ctx, inputs, output) -> None:
    q, k, v, _, _, _, attn_mask, key_lens, ctx.scale, ctx.causal, _, _ = inputs
    ctx.save_for_backward(q, k, v, attn_mask, key_lens)
    ctx.set_materialize_grads(False)


def _gradient(ctx, grad_o, *others):
    """That of PyTorch's own attention at the same inputs."""
    if any(grad is not None for grad in others):
        raise RuntimeError("attention_jvp: only o has a gradient; detach to, lse and mu")
    q, k, v, attn_mask, key_lens = ctx.saved_tensors
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        o = F.scaled_dot_product_attention(
            *leaves,
            attn_mask=_one_mask(attn_mask, key_lens, ctx.causal, q, k),
            is_causal=ctx.causal and attn_mask is None and key_lens is None,
            scale=ctx.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
    grads = torch.autograd.grad(o, leaves, grad_o.to(o.dtype))
    return (*grads, *[None] * 9)


def _one_mask(attn_mask: Tensor | None, key_lens: Tensor | None, causal: bool, q: Tensor, k: Tensor) -> Tensor | None:
    """The masks that PyTorch's attention takes but one of, as one."""
    if key_lens is None and (attn_mask is None or not causal):
        return attn_mask
    keys = torch.arange(k.shape[2], device=q.device)
    kept = torch.ones_like(keys, dtype=torch.bool)
    if key_lens is not None:
        kept = kept & (keys < key_lens[:, None])[:, None, None]
    if causal:
        kept = kept & (keys <= torch.arange(q.shape[2], device=q.device)[:, None])
    if attn_mask is None:
        return kept
    return kept & attn_mask if attn_mask.dtype == torch.bool else attn_mask.masked_fill(~kept, -math.inf)


_operator.register_autograd(_gradient, setup_context=_save)
