"""Forward derivatives of operations for which PyTorch has none, or a slow one: what is asked of it, and what answers instead.

Where an addend, a factor or a bias has no tangent, PyTorch makes up one of zeros; what it spends on the shape of that is ten
times what a small product costs. Here a constant stays one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
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
    """A linear layer or a convolution with a bias: of the tangent the same, without it."""

    def rule(input, weight, bias=None, *args, **kwargs):
        if bias is None or constant(input) or not constant(weight, bias):
            return function(input, weight, bias, *args, **kwargs)
        value = function(primal(input), weight, bias, *args, **kwargs)
        return forward_ad.make_dual(value, function(tangent(input), weight, None, *args, **kwargs))

    return rule


def beside(function: Callable, stand_in: Callable) -> Callable:
    """A sum or a product of what has a tangent with a constant: of the tangent the same, with the constant's stand-in."""

    def rule(input, other, **kwargs):
        t, s = tangent(input), tangent(other)
        if kwargs or (t is None) == (s is None):
            return function(input, other, **kwargs)
        if s is None:
            return forward_ad.make_dual(function(primal(input), other), function(t, stand_in(other)))
        return forward_ad.make_dual(function(input, primal(other)), function(stand_in(input), s))

    return rule


def itself(x: Tensor | complex) -> Tensor | complex:
    return x


def zero(x: Tensor | complex) -> Tensor | complex:
    return x.new_zeros(()).expand(x.shape) if isinstance(x, Tensor) else type(x)(0)


def quotient(function: Callable) -> Callable:
    """By a constant: of the tangent the same."""

    def rule(input, other, **kwargs):
        if kwargs or constant(input) or not constant(other):
            return function(input, other, **kwargs)
        return forward_ad.make_dual(function(primal(input), other), function(tangent(input), other))

    return rule


def normalized(function: Callable) -> Callable:
    """A normalization: PyTorch's derivative of the bare one, which takes no channels-last input, and then the scale."""

    def rule(input, shape, weight=None, *args, **kwargs):
        if constant(input) or not constant(weight, args, kwargs):
            return function(input, shape, weight, *args, **kwargs)
        value = function(primal(input), shape, weight, *args, **kwargs)
        more = {name: x for name, x in kwargs.items() if name != "bias"}
        t = tangent(function(input.contiguous(), shape, None, *(None if isinstance(x, Tensor) else x for x in args), **more))
        if weight is not None:
            t = t * (weight.view(-1, *[1] * (t.ndim - 2)) if function is F.group_norm else weight)
        return forward_ad.make_dual(value, t.to(value))

    return rule


INSTEAD = {
    **{f: affine(f) for f in (F.linear, F.conv1d, F.conv2d, F.conv3d)},
    **{f: beside(f, itself) for f in (Tensor.mul, torch.mul)},
    **{f: beside(f, zero) for f in (Tensor.add, torch.add, Tensor.sub, torch.sub)},
    **{f: quotient(f) for f in (Tensor.div, torch.div)},
    **{f: normalized(f) for f in (F.layer_norm, F.rms_norm, F.group_norm)},
}
