"""Processes and devices, through accelerate: who am I, where do tensors live, means over all, the one door to backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from .errors import UserError

T = TypeVar("T")


def state() -> PartialState:
    """What accelerate knows of this process; of several processes on a machine without accelerator only if it is told so."""
    return PartialState(cpu=not torch.accelerator.is_available())


def device() -> torch.device:
    """This process's device."""
    return state().device


def rank() -> int:
    return state().process_index


def world() -> int:
    return state().num_processes


def backward(loss: Tensor, params: Iterable[nn.Parameter]) -> None:
    """Accumulate the gradient of loss into params alone: nothing leaks into whoever else took part."""
    loss.backward(inputs=list(params))


@torch.no_grad()
def mean_gradients(params: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its mean over processes, in one all-reduce."""
    if world() == 1:
        return
    grads = [p.grad for p in params]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat /= world()
    for g, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        g.copy_(part.view_as(g))


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


def at_first(action: Callable[[], T]) -> T:
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
    return x


@torch.no_grad()
def fill(x: Tensor, values: Tensor) -> None:
    """Copy the values of a whole tensor into one of which each process may hold a share."""
    x.copy_(values)


def wait() -> None:
    """Until every process is here."""
    state().wait_for_everyone()


@contextmanager
def in_turn() -> Iterator[None]:
    """The first process goes ahead, the others follow when it is through: they find in a cache what it put there."""
    with state().main_process_first():
        yield
