"""Each rule against PyTorch's own forward derivative, whatever has a tangent."""

import itertools

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from networks import normal
from torch import Tensor, nn

from stepdistill.derivatives import INSTEAD, constant, tangent, tensors

X, W, B = normal(2, 4, 6), normal(3, 6, seed=1), normal(3, seed=2)
IMAGE = normal(2, 4, 3, 5)
SCALE, SHIFT = normal(4, seed=3), normal(4, seed=4)
CASES = {  # arguments, and keyword arguments
    "linear": (F.linear, (X, W, B), {}),
    "linear without bias": (F.linear, (X, W), {}),
    "linear by name": (F.linear, (X,), {"weight": W, "bias": B}),
    "conv1d": (F.conv1d, (X, normal(3, 4, 3), B), {"padding": 1}),
    "conv2d": (F.conv2d, (IMAGE, normal(2, 2, 3, 3), B[:2], 2, 1, 1, 2), {}),
    "conv3d": (F.conv3d, (IMAGE[:, :, None], normal(3, 4, 1, 1, 1), B), {}),
    "group norm": (F.group_norm, (IMAGE, 2, SCALE, SHIFT, 1e-3), {}),
    "group norm of tokens": (F.group_norm, (X, 2, SCALE), {"bias": SHIFT}),
    "bare group norm": (F.group_norm, (IMAGE, 2), {"eps": 1e-3}),
}


def duals(given, chosen):
    """With tangents where they are chosen, by position among the floating-point tensors."""
    place = itertools.count()

    def dual(x):
        if not isinstance(x, Tensor) or not x.is_floating_point() or (k := next(place)) not in chosen:
            return x
        return forward_ad.make_dual(x, normal(*x.shape, seed=10 + k))

    args, kwargs = given
    return [dual(x) for x in args], {name: dual(x) for name, x in kwargs.items()}


@pytest.mark.parametrize("case", CASES)
def test_a_rule_is_pytorchs_own(case):
    f, *given = CASES[case]
    count = sum(x.is_floating_point() for x in tensors(given))
    with torch.no_grad(), forward_ad.dual_level():
        for size in range(count + 1):
            for chosen in itertools.combinations(range(count), size):
                args, kwargs = duals(given, chosen)
                want, got = forward_ad.unpack_dual(f(*args, **kwargs)), forward_ad.unpack_dual(INSTEAD[f](*args, **kwargs))
                assert torch.equal(got.primal, want.primal) and got.primal.dtype == want.primal.dtype
                assert (got.tangent is None) == (want.tangent is None) == (not chosen)
                if chosen:
                    torch.testing.assert_close(got.tangent, want.tangent, rtol=1e-12, atol=1e-13)


def test_every_rule_is_tried():
    tried = {f for f, *_ in CASES.values()}
    assert {f.__name__ for f in INSTEAD} == {f.__name__ for f in tried}


def test_channels_last_norms_have_a_derivative():
    with torch.no_grad(), forward_ad.dual_level():
        x = forward_ad.make_dual(IMAGE, normal(*IMAGE.shape, seed=1))
        last = forward_ad.make_dual(*(y.to(memory_format=torch.channels_last) for y in forward_ad.unpack_dual(x)))
        for scale in (None, SCALE):
            want = tangent(F.group_norm(x, 2, scale))
            torch.testing.assert_close(tangent(INSTEAD[F.group_norm](last, 2, scale)), want, rtol=0, atol=1e-13)
            with pytest.raises(RuntimeError, match="view size"):
                F.group_norm(last, 2, scale)


def test_parameters_are_constant():
    with torch.no_grad(), forward_ad.dual_level():
        x = forward_ad.make_dual(X, X)
        assert constant(nn.Parameter(X), [X, {"a": 1}]) and not constant([1, {"a": (x,)}])
        assert tangent(3) is None and tangent(X) is None and torch.equal(tangent(x), X)
