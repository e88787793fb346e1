"""Exact Jacobian-vector products through unmodified networks.

PyTorch's fused attention has no forward derivative (pytorch#98164). So, while a derivative is taken, `attention_jvp` answers
the calls of F.scaled_dot_product_attention, whoever makes them. Other operations lose a tangent without a word: they raise.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from stepdistill_kernels import attention_jvp
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode, resolve_name

from .derivatives import INSTEAD, constant, tangent, tensors

BACKENDS = {"auto": "auto", "kernel": "triton", "reference": "reference"}
FREE = {  # may return a tensor without a tangent: it is of another's shape alone; or the tangent is beside it
    torch.empty_like, torch.full_like, torch.ones_like, torch.rand_like, torch.randint_like, torch.randn_like, torch.zeros_like,
    Tensor.new_empty, Tensor.new_empty_strided, Tensor.new_full, Tensor.new_ones, Tensor.new_zeros, torch._VF._unpack_dual,
}  # fmt: skip
OUT = {  # whose results cannot tell that a tangent was dropped: numbers, arrays, pointers for other kernels, in place
    Tensor.__array__, Tensor.__complex__, Tensor.__dlpack__, Tensor.__float__, Tensor.__index__, Tensor.__int__,
    Tensor.data_ptr, Tensor.detach_, Tensor.item, Tensor.numpy, Tensor.tolist, Tensor.untyped_storage,
}  # fmt: skip


@torch.no_grad()
def jvp(
    fn: Callable[..., Tensor],
    primals: Sequence[Tensor],
    tangents: Sequence[Tensor | None],
    attention: str = "auto",
    calls: Counter[str] | None = None,
) -> tuple[Tensor, Tensor]:
    """fn(*primals), and its derivative along the tangents (None: zero), both without a gradient.

    Args:
        fn: tensors to one tensor; what it reads besides has no tangent.
        primals, tangents: of the same shapes and dtypes.
        attention: "kernel", one fused pass, on CUDA; "reference", plain PyTorch; "auto", the kernel where it can.
        calls: counts calls of attention by what had a tangent: "111" query, key and value, "100" the query alone.

    Raises:
        ValueError: attention is something else, or the kernel cannot; attention with dropout.
        RuntimeError: fn has no forward derivative, something in it drops a tangent, or its result has none.
    """
    if attention not in BACKENDS:
        raise ValueError(f"attention {attention!r} is not one of {', '.join(BACKENDS)}")
    with forward_ad.dual_level(), _as_written(), _Watched(BACKENDS[attention], Counter() if calls is None else calls):
        duals = [x if v is None else forward_ad.make_dual(x, v) for x, v in zip(primals, tangents, strict=True)]
        try:
            value, slope = forward_ad.unpack_dual(fn(*duals))
        except NotImplementedError as error:  # "Trying to use forward AD with ... that does not support it"
            raise RuntimeError(f"this network has no exact derivative ({error}); take finite differences instead") from None
    if slope is None:
        raise RuntimeError("the result depends on nothing that has a tangent, or its derivative was lost; take differences")
    return value, slope


@contextmanager
def _as_written() -> Iterator[None]:
    """What is compiled runs as it was written, since compiled code may drop tangents; and no module drops one."""
    if torch.compiler.is_compiling():  # jvp itself is: then all of it
        with torch._dynamo.error_on_graph_break(True):
            yield
    else:
        with torch.compiler.set_stance("force_eager"), register_module_forward_hook(_watch, with_kwargs=True):
            yield


def _watch(module: nn.Module, args: tuple, kwargs: dict, out: object) -> None:
    """Notice what a TorchFunctionMode cannot see: kernels of others that a module calls."""
    with torch._C.DisableTorchFunction():  # nobody need watch the watchman
        if _loses((args, kwargs), out) and any(True for _ in module.parameters()):
            raise _lost(type(module).__name__)


class _Watched(TorchFunctionMode):
    """Every call of PyTorch: attention is answered with its derivative, and no tangent is dropped."""

    def __init__(self, backend: str, calls: Counter[str]):
        super().__init__()
        self.backend, self.calls = backend, calls

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return self.attention(*args, **kwargs)
        if getattr(function, "__name__", "") == "unflatten":  # the method is what torch.compile cannot follow here
            return torch.unflatten(*args, **kwargs)
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():  # where nothing has a tangent
            raise _lost("torch.inference_mode")
        if function in OUT and _moves(args):
            raise _lost(resolve_name(function))
        out = INSTEAD.get(function, function)(*args, **kwargs)
        if function not in FREE and _loses((args, kwargs), out):
            raise _lost(resolve_name(function) or str(function))
        return out

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """F.scaled_dot_product_attention: query [..., H, N, D], key [..., H, M, D], value [..., H, M, E]."""
        if dropout_p:
            told = f"attention with dropout {dropout_p:g} is another function each time; put the network in evaluation mode"
            raise ValueError(told)
        if not constant(attn_mask):
            raise RuntimeError("the mask of attention has a tangent, which is not supported; take finite differences instead")
        query, key, value, attn_mask = _autocast(query, key, value, attn_mask)
        batch = torch.broadcast_shapes(*(x.shape[:-3] for x in (query, key, value)))
        (q, tq), (k, tk), (v, tv) = (forward_ad.unpack_dual(_flat(x, batch)) for x in (query, key, value))
        given = [x is not None for x in (tq, tk, tv)]
        self.calls["".join(str(int(x)) for x in given)] += 1
        how = {"scale": scale, "enable_gqa": enable_gqa}
        if not any(given):
            return F.scaled_dot_product_attention(query, key, value, attn_mask, is_causal=is_causal, **how)
        mask = attn_mask if attn_mask is None or attn_mask.ndim < 4 else _flat(attn_mask, batch)
        o, to = attention_jvp(q, k, v, tq, tk, tv, attn_mask=mask, causal=is_causal, backend=self.backend, **how)
        return forward_ad.make_dual(o, to).reshape(*batch, *query.shape[-3:-1], v.shape[-1])


def _flat(x: Tensor, batch: Sequence[int]) -> Tensor:
    """[..., H, N, D] as [B, H, N, D]."""
    if x.ndim == 4 and x.shape[:-3] == batch:
        return x
    x = x if x.ndim > 2 else x[None]
    return x.expand(*batch, *x.shape[-3:]).reshape(math.prod(batch), *x.shape[-3:])


def _autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """As autocast would hand them to attention."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    kept = (torch.float64, torch.bool)
    return [x if x is None or x.dtype in kept else x.to(dtype) for x in tensors]


def _loses(given: object, out: object) -> bool:
    """Whether something given has a tangent that is not zero, and no tensor that came of it has one.

    The answer to a question, yes or no, needs none.
    """
    if isinstance(out, Tensor) and (out.dtype is torch.bool or tangent(out) is not None):  # most calls end here
        return False
    made = [x for x in tensors(out) if x.dtype is not torch.bool]
    return bool(made) and constant(made) and _moves(given)


def _moves(*given: object) -> bool:
    compiled = torch.compiler.is_compiling()  # then nobody can look: any may
    return any(compiled or bool(t.any()) for x in tensors(given) if (t := tangent(x)) is not None)


def _lost(where: str) -> RuntimeError:
    return RuntimeError(
        f"{where} drops the tangent that reaches it, so the derivative would be wrong: do without it, or take differences"
    )
