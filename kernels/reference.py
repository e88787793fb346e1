"""Attention and its Jacobian-vector product in plain PyTorch: for any device, and in float64 the truth.

With S = scale Q K^T, tS = scale (tQ K^T + Q tK^T), P = softmax(S), H = P tS elementwise and mu = rowsum(H):

    O = P V,    tO = P tV + H V - mu O.

Keys pass by in chunks, as in online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867). Two accumulators as wide as V
suffice, besides each row's largest logit m, the sum of p = exp(S - m), and that of p tS.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

WORKSPACE = 2**24  # logits at a time


def attention_jvp(
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
    workspace: int = WORKSPACE,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """O and tO [B, H, Nq, Dv], the logarithm of the softmax's sum and mu [B, H, Nq], all in at least float32.

    Shapes and rules are those of the public function; the workspace holds this many logits, at least one key for each query.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    kv_heads, rows = k.shape[1], q.shape[2]

    def by_group(x: Tensor | None) -> Tensor | None:
        """[B, H, ...] as [B, Hk, H / Hk, ...], in the precision that is computed in."""
        return None if x is None else x.to(dtype).unflatten(1, (kv_heads, -1))

    q, k, v, tq, tk, tv = map(by_group, (q, k, v, tq, tk, tv))
    if attn_mask is not None:
        attn_mask = attn_mask.expand(q.shape[0], -1, rows, k.shape[-2])
        heads = attn_mask.shape[1]
        attn_mask = attn_mask.unflatten(1, (kv_heads, -1) if heads > 1 else (1, 1))

    largest = q.new_full(q.shape[:-1], -math.inf)
    total, slope = torch.zeros_like(largest), torch.zeros_like(largest)
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    t_out = torch.zeros_like(out)
    chunk = max(1, workspace // max(1, largest.numel()))
    for first in range(0, k.shape[-2], chunk):
        here = slice(first, first + chunk)
        positions = torch.arange(first, min(first + chunk, k.shape[-2]), device=q.device)
        keys, values, t_keys, t_values = (None if x is None else x[..., here, :] for x in (k, v, tk, tv))
        kept = None  # where a query may look, if not everywhere
        if key_lens is not None:  # what lies beyond may be anything, NaN too
            kept = (positions < key_lens[:, None])[:, None, None, None]
            keys, values, t_keys, t_values = (
                None if x is None else x.masked_fill(~kept.mT, 0) for x in (keys, values, t_keys, t_values)
            )
        if causal:
            seen = positions <= torch.arange(rows, device=q.device)[:, None]
            kept = seen if kept is None else kept & seen

        logits = scale * (q @ keys.mT)
        if attn_mask is not None:
            mask = attn_mask[..., here]
            if mask.dtype == torch.bool:
                kept = mask if kept is None else kept & mask
            else:
                logits = logits + mask
        if kept is not None:
            logits = logits.masked_fill(~kept, -math.inf)

        before, largest = largest, torch.maximum(largest, logits.amax(-1))
        level = largest.masked_fill(largest == -math.inf, 0)  # a row without a key so far
        weights, fade = (logits - level[..., None]).exp_(), (before - level).exp_()
        total = fade * total + weights.sum(-1)
        out = fade[..., None] * out + weights @ values
        t_out = fade[..., None] * t_out
        slope = fade * slope
        if t_values is not None:
            t_out += weights @ t_values
        if tq is not None or t_keys is not None:
            t_logits = 0
            if tq is not None:
                t_logits = tq @ keys.mT
            if t_keys is not None:
                t_logits = t_logits + q @ t_keys.mT
            turned = weights.mul_(scale * t_logits)
            slope += turned.sum(-1)
            t_out += turned @ values

    share = torch.where(total > 0, 1 / total, 0)
    out, mu = out * share[..., None], slope * share
    t_out = t_out * share[..., None] - mu[..., None] * out
    return tuple(x.flatten(1, 2) for x in (out, t_out, largest + total.log(), mu))
