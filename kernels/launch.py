"""Hands tensors to the fused kernel: what it can compute, in which tiles, and how it reads them."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from . import triton_kernel
from .tiles import ROOMY, Tile, tiles, widths

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WIDEST = 256
INTERPRETED = triton.knobs.runtime.interpret


def unable(q: Tensor, k: Tensor, v: Tensor, scale: float) -> str:
    """Why the kernel cannot compute this, or nothing."""
    if q.dtype not in DTYPES:
        return f"it computes in {', '.join(str(x) for x in DTYPES)}, not in {q.dtype}"
    if q.shape[3] != v.shape[3] or not 1 <= q.shape[3] <= WIDEST:
        return f"heads are equally wide in q, k and v, from 1 to {WIDEST}: not {q.shape[3]} and {v.shape[3]}"
    if 0 in (*q.shape, *k.shape):
        return "there is nothing to compute"
    if not scale > 0:
        return f"the scale is above 0, not {scale}"
    if q.device.type == "cpu":
        return "" if INTERPRETED else "on the CPU it runs only in Triton's interpreter (TRITON_INTERPRET=1)"
    if q.device.type != "cuda" or torch.version.hip:
        return f"it runs on CUDA devices, not on {'ROCm' if torch.version.hip else q.device.type}"
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return f"it needs compute capability 8.0, and {torch.cuda.get_device_name(q.device)} has less"
    return ""


def forward(
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
    o: Tensor,
    to: Tensor,
    tile: Tile | None = None,
    centred: bool = True,
) -> tuple[Tensor, Tensor]:
    """Fills o and to [B, H, Nq, D]; lse and mu [B, H, Nq] (float32). `unable` must have nothing against it.

    Args:
        attn_mask: [B or 1, H or 1, Nq or 1, Nk or 1].
        tile: another than the table's.
        centred: False leaves out what keeps low precision precise, to show what it is good for.
    """
    (batch, heads, rows, d), keys = q.shape, k.shape[2]
    q, k, v, tq, tk, tv = (None if x is None else _dense_rows(x) for x in (q, k, v, tq, tk, tv))
    tensors = {"Q": q, "K": k, "V": v, "TQ": tq, "TK": tk, "TV": tv}
    if attn_mask is not None:
        if attn_mask.shape[2] == 1 and attn_mask.dtype == torch.bool:  # small; added, it takes fewer registers
            attn_mask = torch.zeros_like(attn_mask, dtype=torch.float32).masked_fill_(~attn_mask, -torch.inf)
        if attn_mask.shape[3] < keys or attn_mask.stride(3) != 1:
            attn_mask = attn_mask.expand(-1, -1, -1, keys).contiguous()
        attn_mask = attn_mask.expand(batch, heads, -1, -1)
    if key_lens is not None:
        key_lens = key_lens.contiguous()
    lse = q.new_empty(batch, heads, rows, dtype=torch.float32)
    mu = torch.empty_like(lse)
    d0, d1 = widths(d)
    tma = (
        d1 == 0
        and key_lens is None
        and (INTERPRETED or torch.cuda.get_device_capability(q.device) >= (9, 0))
        and all(_describable(x) for x in tensors.values() if x is not None)
    )
    masked = 0 if attn_mask is None else 1 if attn_mask.shape[2] == 1 else 2
    strides = {
        f"{name.lower()}_{of}": 0 if x is None else x.stride(i)
        for name, x in (tensors | {"OUT": o}).items()
        for i, of in enumerate("bhn")
    }
    for i, of in enumerate("bhqk"):
        strides[f"mask_{of}"] = 0 if attn_mask is None else attn_mask.stride(i)
    flags = {"HAS_TQ": tq is not None, "HAS_TK": tk is not None, "HAS_TV": tv is not None, "MASKED": masked}
    flags |= {"HAS_LENS": key_lens is not None, "CAUSAL": causal, "CENTRED": centred, "TMA": tma, "UPCAST": INTERPRETED}

    choice = [tile] if tile else tiles(d, q.dtype, flags, _shared_memory(q.device))
    for rows_at_once, keys_at_once, stages, warps in choice:
        height = {name: rows_at_once if name in ("Q", "TQ") else keys_at_once for name in tensors}
        read = {name: _descriptor(x, [1, 1, height[name], d0]) if tma and x is not None else x for name, x in tensors.items()}
        try:
            with torch.cuda.device_of(q):
                triton_kernel.attention_jvp[triton.cdiv(rows, rows_at_once), heads, batch](
                    **read, MASK=attn_mask, LENS=key_lens, OUT=o, T_OUT=to, LSE=lse, MU=mu,
                    scale=scale, group=heads // k.shape[1], rows=rows, keys=keys, **strides,
                    D=d, D0=d0, D1=d1, ROWS=rows_at_once, KEYS=keys_at_once, RAGGED=keys % keys_at_once != 0, **flags,
                    num_stages=stages, num_warps=warps,
                )  # fmt: skip
        except OutOfResources:
            continue
        return lse, mu
    raise RuntimeError(f"attention_jvp: no tile of the fused kernel fits into {torch.cuda.get_device_name(q.device)}")


def _shared_memory(device: torch.device) -> int:
    """Bytes that a block can have."""
    return ROOMY if INTERPRETED else torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _dense_rows(x: Tensor) -> Tensor:
    """With the numbers of a head side by side; any other strides are read as they are."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _describable(x: Tensor) -> bool:
    """Whether the chip's copy engine can read it: 16-byte steps from a 16-byte address."""
    return x.data_ptr() % 16 == 0 and all(n == 1 or (step > 0 and step * x.itemsize % 16 == 0) for n, step in _outer(x))


def _outer(x: Tensor) -> list[tuple[int, int]]:
    return list(zip(x.shape[:3], x.stride()[:3], strict=True))


def _descriptor(x: Tensor, block: list[int]) -> TensorDescriptor:
    steps = [step if n > 1 else 16 * x.shape[3] for n, step in _outer(x)]  # nobody steps along a side of one
    return TensorDescriptor(x, list(x.shape), [*steps, 1], block)
