"""Forward derivatives of operations that have none in PyTorch, or a slow one: what is asked for, and what answers instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn


def tensors(x: object) -> Iterator[Tensor]:
    """Those in x, and in the tuples, lists and dictionaries that it holds."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (tuple, list)):
        for y in x:
            yield from tensors(y)
    elif isinstance(x, dict):
        yield from tensors([*x.values()])


def tangent(x: object) -> Tensor | None:
    """The tangent of a tensor that has one; parameters never do."""
    return None if not isinstance(x, Tensor) or isinstance(x, nn.Parameter) else forward_ad.unpack_dual(x).tangent


def primal(x: Tensor) -> Tensor:
    """A tensor without its tangent."""
    return forward_ad.unpack_dual(x).primal


def constant(*given: object) -> bool:
    """Whether nothing in it has a tangent."""
    return all(tangent(x) is None for x in tensors(given))


def affine(function: Callable) -> Callable:
    """A linear layer or a convolution: of the tangent the same, without the bias, for which PyTorch would make up a tangent."""

    def rule(input, weight, bias=None, *args, **kwargs):
        if bias is None or constant(input) or not constant(weight, bias):
            return function(input, weight, bias, *args, **kwargs)
        value = function(primal(input), weight, bias, *args, **kwargs)
        return forward_ad.make_dual(value, function(tangent(input), weight, None, *args, **kwargs))

    return rule


def group_norm(input: Tensor, *args, **kwargs) -> Tensor:
    """F.group_norm, whose forward derivative takes no channels-last input."""
    return F.group_norm(input.contiguous(), *args, **kwargs)


INSTEAD = {f: affine(f) for f in (F.linear, F.conv1d, F.conv2d, F.conv3d)} | {F.group_norm: group_norm}
