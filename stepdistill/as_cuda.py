"""What a CUDA device does otherwise than the meta device: attention in one fused kernel, and autocast."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Of PyTorch's "CUDA Op-Specific Behavior", what networks here call.
LOWERED = {
    F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, torch.conv1d,
    torch.conv2d, torch.conv3d, torch.matmul, torch.bmm, torch.baddbmm, torch.addmm, torch.mm, torch.einsum, Tensor.matmul,
    Tensor.__matmul__, Tensor.bmm, F.scaled_dot_product_attention,
}  # fmt: skip
RAISED = {
    F.layer_norm, F.group_norm, torch.group_norm, torch.layer_norm, F.softmax, torch.softmax, Tensor.softmax, F.mse_loss,
    torch.exp, torch.log, torch.pow, Tensor.pow, Tensor.__pow__, torch.rsqrt, Tensor.rsqrt, torch.sum, Tensor.sum, torch.norm,
    F.softplus, torch.cumsum,
}  # fmt: skip


class AsCuda(TorchFunctionMode):
    """While it is on, attention on the meta device keeps its inputs, its output and one number a row, as fused kernels do,
    and (precision) operations cast as CUDA's autocast casts them."""

    def __init__(self, precision: torch.dtype | None = None):
        super().__init__()
        self.precision = precision

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.precision and function in LOWERED:
            args, kwargs = self._to(self.precision, args, kwargs)
        elif self.precision and function in RAISED:
            args, kwargs = self._to(torch.float32, args, kwargs)
        if function is F.scaled_dot_product_attention and (args[0] if args else kwargs["query"]).is_meta:
            return fused(*args, **kwargs)
        return function(*args, **kwargs)

    def _to(self, dtype: torch.dtype, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        def cast(x: Any) -> Any:
            if not (isinstance(x, Tensor) and x.is_meta and x.is_floating_point()):
                return x
            return x if x.dtype is torch.float64 else x.to(dtype)

        return tuple(map(cast, args)), {key: cast(value) for key, value in kwargs.items()}


def fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """F.scaled_dot_product_attention of query [..., H, N, D], key and value [..., H, M, D] in one kernel that has no N x M
    matrix. A mask costs what it holds."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    shape = query.shape
    q, k, v = (x.reshape(-1, *x.shape[-3:]) if x.ndim != 4 else x for x in (query, key, value))
    bias = None
    if attn_mask is not None:
        size = (len(q), q.shape[1], q.shape[2], k.shape[2])
        bias = q.new_empty(()).expand(size) if attn_mask.dtype is torch.bool else attn_mask.to(q.device, q.dtype).expand(size)
    out = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, dropout_p, is_causal, scale=scale)[0]
    return out.reshape(*shape[:-1], value.shape[-1])
