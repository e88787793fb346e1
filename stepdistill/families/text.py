"""Texts of different lengths as rows of one length with a mask, which can be cached and batched anew, and back."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def padded(rows: Iterable[Tensor], length: int) -> dict[str, Tensor]:
    """Rows [L_i, C], L_i at most length -> "text" [N, length, C], zero after each row's end, and "mask" [N, length], bool."""
    rows = list(rows)
    text = torch.stack([torch.nn.functional.pad(row, (0, 0, 0, length - len(row))) for row in rows])
    ends = torch.tensor([len(row) for row in rows], device=text.device)
    return {"text": text, "mask": torch.arange(length, device=text.device) < ends[:, None]}


def ragged(text: Tensor, mask: Tensor) -> list[Tensor]:
    """The rows [L_i, C] that `padded` was given."""
    return [row[keep] for row, keep in zip(text, mask, strict=True)]


def trimmed(text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Text [N, L, C] and mask [N, L] of the longest row's length L; no mask where all rows are of that length."""
    text, mask = text[:, : (longest := int(mask.sum(1).max()))], mask[:, :longest]
    return text, None if mask.all() else mask
