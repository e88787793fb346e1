"""Attention problems, and what float64 says of them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

F64 = torch.float64
TANGENTS = ("111", "110", "101", "011", "100", "010", "001", "000")


@dataclass(frozen=True)
class Problem:
    """q, k, v and their tangents (None where absent), and the keyword arguments of attention_jvp."""

    tensors: tuple[Tensor | None, ...]
    how: dict = field(default_factory=dict)

    def double(self) -> Problem:
        return replace(self, tensors=tuple(None if x is None else x.double() for x in self.tensors))

    def poisoned(self) -> Problem:
        """With NaN in all keys, values and tangents that do not count."""
        spoilt = list(self.tensors)
        for i in (1, 2, 4, 5):
            if spoilt[i] is not None:
                beyond = torch.arange(spoilt[i].shape[2]) >= self.how["key_lens"][:, None]
                spoilt[i] = spoilt[i].masked_fill(beyond[:, None, :, None], float("nan"))
        return replace(self, tensors=tuple(spoilt))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def problem(
    batch=2, heads=4, kv_heads=4, rows=5, keys=7, d=8, tangents="111", dtype=F64, layout="heads first", seed=0, **how
) -> Problem:  # fmt: skip
    """A random one; layout: "heads first", "tokens first", "fused" (one tensor of all projections) or "last first"."""
    sizes = [(heads, rows), (kv_heads, keys), (kv_heads, keys)]

    def laid(heads: int, n: int, seed: int) -> Tensor:
        if layout == "heads first":
            return normal(batch, heads, n, d, seed=seed, dtype=dtype)
        if layout == "tokens first":
            return normal(batch, n, heads, d, seed=seed, dtype=dtype).transpose(1, 2)
        if layout == "fused":
            return normal(batch, n, 3, heads, d, seed=seed, dtype=dtype)[:, :, 1].transpose(1, 2)
        return normal(batch, heads, d, n, seed=seed, dtype=dtype).mT

    given = [laid(*size, seed=10 * seed + i) for i, size in enumerate(sizes)]
    given += [
        laid(*size, seed=10 * seed + 3 + i) if bit == "1" else None
        for i, (size, bit) in enumerate(zip(sizes, tangents, strict=True))
    ]
    return Problem(tuple(given), how | ({"enable_gqa": True} if heads != kv_heads else {}))


def truth(of: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o, to, lse and mu of float64 tensors, from the definition and PyTorch's forward-mode derivative of it."""
    q, k, v = (x.double() for x in of.tensors[:3])
    tangents = tuple(torch.zeros_like(x) if t is None else t.double() for x, t in zip((q, k, v), of.tensors[3:], strict=True))
    rows, keys = q.shape[2], k.shape[2]
    kept = torch.ones(q.shape[0], 1, rows, keys, dtype=torch.bool)
    if (lens := of.how.get("key_lens")) is not None:
        kept = kept & (torch.arange(keys) < lens[:, None])[:, None, None]
    if of.how.get("causal"):
        kept = kept & (torch.arange(keys) <= torch.arange(rows)[:, None])
    mask = of.how.get("attn_mask")
    added = 0
    if mask is not None:
        kept, added = (kept & mask, 0) if mask.dtype == torch.bool else (kept & ~mask.isneginf(), mask.double())
    some = kept.any(-1)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        logits = q @ k.mT * of.how.get("scale", q.shape[-1] ** -0.5) + added
        logits = torch.where(kept, logits, -1e9)  # a derivative that -inf would spoil
        weights = torch.where(kept & some[..., None], logits.softmax(-1), 0)
        return weights @ v, torch.where(kept, logits, -torch.inf).logsumexp(-1)

    (o, lse), (to, mu) = torch.func.jvp(attention, (q, k, v), tangents)
    return o, to, lse, torch.where(some.expand(lse.shape), mu, 0)


def error(got: Tensor, want: Tensor) -> float:
    """Relative, in the Euclidean norm; infinite numbers must be the same."""
    where = want.isfinite()
    assert torch.equal(got.isfinite(), where) and torch.equal(got[~where].double(), want[~where])
    difference = (got[where].double() - want[where]).norm()
    return float(difference / want[where].norm()) if want[where].norm() > 1e-9 else float(difference)
