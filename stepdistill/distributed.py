"""Processes and devices, through accelerate: who am I, where do tensors live, means over all, the one door to backward."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from .errors import UserError

Item, Result = TypeVar("Item"), TypeVar("Result")

TIMEOUT = timedelta(hours=1)  # that processes wait for each other: longer than what the first one ever does alone


class Lost(RuntimeError):
    """Another process failed, and says why itself."""


def state() -> PartialState:
    """What accelerate knows of this process; of several processes on a machine without accelerator only if it is told so."""
    several = {"timeout": TIMEOUT} if int(os.environ.get("WORLD_SIZE", 1)) > 1 else {}
    return PartialState(cpu=not torch.accelerator.is_available(), **several)


def device() -> torch.device:
    """This process's device."""
    return state().device


def rank() -> int:
    return state().process_index


def world() -> int:
    return state().num_processes


def backward(loss: Tensor, params: Sequence[nn.Parameter], others: Sequence[nn.Parameter] = ()) -> None:
    """Accumulate the gradient of loss into params alone: nothing leaks into whoever else took part.

    others: parameters that require gradients as well. Into sharded ones autograd cannot be told not to go: their gradients
    are set aside meanwhile.
    """
    if not any(map(sharded, params)):
        loss.backward(inputs=list(params))
        return
    aside = [p.grad for p in others]
    for p in others:
        p.grad = None
    loss.backward()
    for p, grad in zip(others, aside, strict=True):
        p.grad = grad


def sharded(x: Tensor) -> bool:
    """Whether this process holds a share of a tensor only. Gradients of such parameters are means over processes already."""
    module = sys.modules.get("torch.distributed.tensor")  # whose import takes a second; without it nothing was sharded
    return module is not None and isinstance(x, module.DTensor)


def in_shares(net: nn.Module) -> bool:
    """Whether all processes must run a network for one to run it."""
    return any(map(sharded, net.parameters()))


def local(x: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return x.to_local() if sharded(x) else x


@torch.no_grad()
def mean_gradients(params: Iterable[nn.Parameter]) -> None:
    """Replace each gradient of which every process has its own by their mean, in one all-reduce.

    A parameter that has none on some processes, as of an expert that none of their samples asked for, counts as zero there; one
    that has none anywhere keeps none.
    """
    mine = [p for p in params if not sharded(p)]
    if world() == 1 or not mine:
        return
    has = mine[0].new_tensor([p.grad is not None for p in mine])
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in mine] + [has])
    dist.all_reduce(flat)
    flat /= world()
    *grads, has = flat.split([*(p.numel() for p in mine), len(mine)])
    for p, part, some in zip(mine, grads, has.tolist(), strict=True):
        if p.grad is not None:
            p.grad.copy_(part.view_as(p))
        elif some:
            p.grad = part.view_as(p).clone()


@torch.no_grad()
def norm(tensors: Iterable[Tensor]) -> Tensor:
    """Of all of them together: those of which every process has all, and those that are sharded."""
    kinds = {kind: [x for x in tensors if sharded(x) == kind] for tensors in [list(tensors)] for kind in (False, True)}
    norms = [whole(nn.utils.get_total_norm(kind)) for kind in kinds.values() if kind]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


@torch.no_grad()
def clip(params: Iterable[nn.Parameter], norm: float, limit: float) -> None:
    """Scale gradients whose norm together is `norm` down to the norm `limit`, if it is greater."""
    torch._foreach_mul_([local(p.grad) for p in params], min(1.0, limit / (norm + 1e-6)))


@torch.no_grad()
def mean(x: Tensor) -> Tensor:
    """Mean of a tensor over processes."""
    if world() == 1:
        return x
    x = x.clone()
    dist.all_reduce(x)
    return x / world()


def anyone(flag: bool) -> bool:
    """Whether a flag is up on any process; all ask at the same point."""
    if world() == 1:
        return flag
    up = torch.tensor(float(flag), device=device())
    dist.all_reduce(up, dist.ReduceOp.MAX)
    return bool(up)


def told(value: Any) -> Any:
    """The first process's value, on all of them; all ask at the same point. What the others give is ignored."""
    if world() == 1:  # asked first: accelerate's function would make a state that does not know of other processes on CPUs
        return value
    return broadcast_object_list([value])[0]


def at_first(action: Callable[[], Result]) -> Result:
    """What an action gives on the first process, which alone does it, on all of them; all ask at the same point.

    Raises:
        UserError, OSError: the action did, on all of them.
    """
    found, failed = None, None
    if rank() == 0:
        try:
            found = action()
        except (UserError, OSError) as error:
            failed = error
    found, failed = told((found, failed))
    if failed is not None:
        raise failed
    return found


def whole(x: Tensor) -> Tensor:
    """A tensor of which each process may hold a share: all of it, on every process, all of which ask at the same point."""
    return x.full_tensor() if sharded(x) else x


@torch.no_grad()
def fill(x: Tensor, values: Tensor) -> None:
    """Copy the values of a whole tensor into one of which each process may hold a share. Nothing is communicated."""
    local(x).copy_(share_of(values, x) if sharded(x) else values)


def share_of(values: Tensor, x: Tensor) -> Tensor:
    """This process's share of a whole tensor, which is shared out as x is."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(values.to(x.device), x.device_mesh, x.placements, src_data_rank=None).to_local()


def wait() -> None:
    """Until every process is here."""
    state().wait_for_everyone()


def share(items: Sequence[Item], together: bool = False) -> Sequence[Item]:
    """Those of a job that fall to this process, each `world`-th; of processes that work together all do all."""
    return items if together else items[rank() :: world()]


@contextmanager
def in_turn() -> Iterator[None]:
    """The first process goes ahead, the others follow when it is through: they find in a cache what it put there.

    Raises:
        Lost: in the others, if it failed.
    """
    if rank() > 0:
        if not told(None):
            raise Lost("the first process failed while the others waited for it")
        yield
        return
    fine = False
    try:
        yield
        fine = True
    finally:
        told(fine)


def lost(error: BaseException) -> bool:
    """Whether an error says no more than that another process is gone."""
    return isinstance(error, Lost | dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def leave() -> None:
    """Take leave of the other processes, at the end of all work."""
    if dist.is_available() and dist.is_initialized():
        state().destroy_process_group()
