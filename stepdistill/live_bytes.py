"""How many bytes of tensors are alive, and the most there ever were: counted, operation by operation, on any device.

On the meta device nothing is computed, so a network of any size is measured in seconds.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

SCALAR = torch.ops.aten._local_scalar_dense.default


class LiveBytes(TorchDispatchMode):
    """While it is on: bytes of the storages of one device that operations made, or `hold` named, and that still live.

    Floating point operations of matrix products, convolutions and attention are counted too, 2 for a product and a sum. A
    tensor on the meta device that is asked for its number says 1.
    """

    def __init__(self, device: str = "meta"):
        super().__init__()
        self.device, self.now, self.peak, self.flops = device, 0, 0, 0
        self._alive: dict[int, weakref.ref] = {}

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
        out = function(*args, **kwargs)
        if (flops := flop_registry.get(function._overloadpacket)) is not None:
            self.flops += flops(*args, **kwargs, out_val=out)
        for x in (out,) if isinstance(out, Tensor) else out if isinstance(out, tuple | list) else ():
            if isinstance(x, Tensor):
                self._add(x)
        return out
