"""How many bytes of tensors are alive, and the most there ever were: counted, operation by operation, on any device.

On the meta device nothing is computed, so a network of any size is measured in seconds.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

INDEX = torch.ops.aten.index.Tensor  # a mask's numbers decide its shape
SCALAR = torch.ops.aten._local_scalar_dense.default
COPY = torch.ops.aten._to_copy.default


class LiveBytes(TorchDispatchMode):
    """While it is on: bytes of the storages of one device that operations made, or `hold` named, and that still live.

    Floating point operations of matrix products, convolutions and attention are counted too, 2 for a product and a sum. A
    tensor on the meta device that is asked for its number says 1, and so do its copies elsewhere.
    """

    def __init__(self, device: str = "meta"):
        super().__init__()
        self.device, self.now, self.peak, self.flops = device, 0, 0, 0
        self._alive: dict[int, weakref.ref] = {}
        self._known: dict[Hashable, tuple[Any, int]] = {}

    def hold(self, tensors: Iterable[Tensor]) -> int:
        """Count these as alive too; returns the bytes that are new."""
        before = self.now
        for x in tensors:
            self._add(x)
        return self.now - before

    def lap(self) -> int:
        """The peak since the last lap."""
        peak, self.peak = self.peak, self.now
        return peak

    def spike(self, size: int) -> None:
        """As if something of `size` bytes came and went."""
        self.peak = max(self.peak, self.now + size)

    def _add(self, x: Tensor) -> None:
        if x.device.type != self.device:
            return
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def gone(_: object) -> None:
            self.now -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is SCALAR and args[0].is_meta:
            return 1.0 if args[0].is_floating_point() else 1
        if function is COPY and args[0].is_meta and torch.device(kwargs.get("device") or "meta").type != "meta":
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device=kwargs["device"])
        out = self._shaped(function, args, kwargs)
        for x in (out,) if isinstance(out, Tensor) else out if isinstance(out, tuple | list) else ():
            if isinstance(x, Tensor):
                self._add(x)
        return out

    def _shaped(self, function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What it returns. Networks repeat their blocks, and finding a shape takes far longer than using it again."""
        try:
            key = (function, described(args), described(tuple(kwargs.items()))) if fresh(function) else None
        except Numbers:
            key = None
            if function is not INDEX:
                args, kwargs = together(args), together(kwargs)
        if key in self._known:
            like, flops = self._known[key]
            out = remade(like)
        else:
            out = function(*args, **kwargs)
            count = flop_registry.get(function._overloadpacket)
            flops = count(*args, **kwargs, out_val=out) if count else 0
            if key is not None and (like := form(out)) is not None:
                self._known[key] = like, flops
        self.flops += flops
        return out


class Numbers(Exception):
    """A tensor that is not on the meta device: what it holds may decide a shape."""


def together(args: Any) -> Any:
    """All tensors on the meta device, if one of them is there."""
    if not any(isinstance(x, Tensor) and x.is_meta for x in tree_leaves(args)):
        return args
    return tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, args)


@cache
def fresh(function: Any) -> bool:
    """Whether an operation changes none of its inputs, and returns tensors that share no memory with them."""
    schema = function._schema
    return not any(x.alias_info for x in (*schema.arguments, *schema.returns))


def described(x: Any) -> Hashable:
    """All of an argument that may decide a shape. Raises Numbers."""
    if isinstance(x, Tensor):
        if not x.is_meta:
            raise Numbers
        return x.shape, x.stride(), x.dtype
    return tuple(map(described, x)) if isinstance(x, tuple | list) else (type(x), x)  # 1, 1.0 and True are equal


def form(out: Any) -> Any:
    """Shapes, strides and type of one tensor or several on the meta device; None of anything else."""
    if isinstance(out, Tensor):
        return (out.shape, out.stride(), out.dtype) if out.is_meta else None
    several = [form(x) for x in out] if isinstance(out, tuple | list) else [None]
    return None if None in several else several


def remade(like: Any) -> Any:
    """New tensors of that form."""
    if isinstance(like, list):
        return tuple(map(remade, like))
    shape, stride, dtype = like
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
