"""Jacobian-vector products of functions: attention's are exact, and no tangent is lost without an error."""

from __future__ import annotations

import functools
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from networks import normal
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from worlds import F64

from stepdistill.attention import jvp

attend = F.scaled_dot_product_attention


def heads(*batch, n=7, m=5, k_heads=4, d=8, e=6, k_batch=None):
    """Query [..., 4, n, d], key [..., k_heads, m, d], value [..., k_heads, m, e]; and tangents of theirs."""
    k_batch = batch if k_batch is None else k_batch
    shapes = (*batch, 4, n, d), (*k_batch, k_heads, m, d), (*k_batch, k_heads, m, e)
    return [[normal(*shape, seed=i) for i, shape in enumerate(shapes, start)] for start in (0, 5)]


SOME = normal(2, 1, 7, 5, seed=3) > -0.5
CALLS = {  # batch; keyword arguments of a call, and of `heads`
    "plain": ((2,), {}, {}),
    "scale": ((2,), {"scale": 0.7}, {}),
    "causal": ((2,), {"is_causal": True}, {"n": 5}),
    "longer than its keys, causal": ((2,), {"is_causal": True}, {}),
    "bias": ((2,), {"attn_mask": normal(2, 1, 7, 5, seed=4)}, {}),
    "mask": ((2,), {"attn_mask": SOME}, {}),
    "mask of two dimensions": ((2,), {"attn_mask": SOME[0, 0]}, {}),
    "no key left": ((2,), {"attn_mask": SOME & (torch.arange(7) != 2)[:, None]}, {}),
    "grouped": ((2,), {"enable_gqa": True}, {"k_heads": 2}),
    "no batch": ((), {"attn_mask": SOME[0].expand(4, -1, -1)}, {}),
    "more batches": ((3, 2), {"attn_mask": SOME}, {}),
    "one batch of keys": ((2,), {}, {"k_batch": (1,)}),
}


@pytest.mark.parametrize("call", CALLS)
def test_attention_is_the_stock_function_and_so_is_its_derivative(call):
    batch, how, sizes = CALLS[call]
    inputs, tangents = heads(*batch, **sizes)
    f = functools.partial(attend, **how)
    got, slope = jvp(f, inputs, tangents)
    with sdpa_kernel(SDPBackend.MATH):
        torch.testing.assert_close(got, f(*inputs), rtol=0, atol=1e-13)
        ahead, behind = (f(*(x + h * d for x, d in zip(inputs, tangents, strict=True))) for h in (1e-5, -1e-5))
    torch.testing.assert_close(slope, (ahead - behind) / 2e-5, rtol=0, atol=1e-8)
    if call == "no key left":
        assert not got[:, :, 2].any() and not slope[:, :, 2].any()


def test_attention_without_heads():
    inputs, tangents = ([x[0] for x in some] for some in heads())
    got, slope = jvp(attend, inputs, tangents)
    want = jvp(attend, *([x[None, None] for x in some] for some in (inputs, tangents)))
    assert torch.equal(got, want[0][0, 0]) and torch.equal(slope, want[1][0, 0])


@pytest.mark.parametrize("given", ["111", "100", "011", "010", "001"])
def test_derivative_of_attention_is_the_closed_form(given):
    """dO = P (dS - rowsum(P dS)) V + P dV with dS = (dQ K^T + Q dK^T) / sqrt(D); absent tangents are zeros."""
    inputs, tangents = heads(2)
    tangents = [d if bit == "1" else None for d, bit in zip(tangents, given, strict=True)]
    calls = Counter()
    got, slope = jvp(attend, inputs, tangents, calls=calls)
    q, k, v = inputs
    dq, dk, dv = (torch.zeros_like(x) if d is None else d for x, d in zip(inputs, tangents, strict=True))
    weights, logits = (q @ k.mT / math.sqrt(8)).softmax(-1), (dq @ k.mT + q @ dk.mT) / math.sqrt(8)
    turned = weights * (logits - (weights * logits).sum(-1, keepdim=True))
    torch.testing.assert_close(got, attend(q, k, v), rtol=0, atol=1e-13)
    torch.testing.assert_close(slope, turned @ v + weights @ dv, rtol=0, atol=1e-13)
    assert calls == {given: 1}


def test_absent_tangents_reach_the_kernel_as_none(monkeypatch):
    """What is constant costs nothing: it is no tensor of zeros."""
    seen = []

    def watched(*args, **kwargs):
        seen.append((*(x is not None for x in args[3:]), kwargs["backend"]))
        return args[0], args[0]

    monkeypatch.setattr("stepdistill.attention.attention_jvp", watched)
    q, k, v = (normal(1, 1, 3, 2, seed=i) for i in range(3))
    for backend in ("auto", "kernel", "reference"):
        jvp(lambda x, backend=backend: attend(x * 2, k, v) + x + attend(q, k, v), (q,), (q,), attention=backend)
    assert seen == [(True, False, False, name) for name in ("auto", "triton", "reference")]


def test_attention_without_tangents_is_pytorchs_own():
    (q, k, v), _ = heads(2)
    calls = Counter()
    got, slope = jvp(lambda x: x * attend(q, k, v, SOME).sum(), (q,), (q,), calls=calls)
    assert torch.equal(got, slope) and torch.equal(got, q * attend(q, k, v, SOME).sum()) and calls == {"000": 1}


def test_attention_is_computed_in_float32_at_least():
    low, turns = ([x.bfloat16() for x in some] for some in heads(2))
    got = jvp(attend, low, turns)
    want = jvp(attend, *([x.double() for x in some] for some in (low, turns)))
    assert all(x.dtype == torch.bfloat16 and torch.equal(x, y.bfloat16()) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 3, (torch.float32, torch.bfloat16, torch.float32)])
def test_autocast_reaches_attention_and_not_its_inside(dtypes):
    inputs, tangents = heads(2)
    low, turns = ([x.bfloat16() for x in some] for some in (inputs, tangents))
    mixed, theirs = ([x.to(dtype) for x, dtype in zip(some, dtypes, strict=True)] for some in (low, turns))
    bias = normal(7, 5).bfloat16()
    want = jvp(functools.partial(attend, attn_mask=bias), low, turns)
    with torch.autocast("cpu", torch.bfloat16):
        got = jvp(functools.partial(attend, attn_mask=bias.float()), mixed, theirs)
        double = jvp(attend, inputs, tangents)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    assert double[1].dtype == F64


def test_what_attention_cannot_be_asked():
    inputs, tangents = heads(2)
    with pytest.raises(ValueError, match="evaluation mode"):
        jvp(functools.partial(attend, dropout_p=0.1), inputs, tangents)
    with pytest.raises(RuntimeError, match="mask of attention has a tangent"):
        jvp(lambda bias: attend(*inputs, bias), (normal(7, 5),), (normal(7, 5),))
    with pytest.raises(ValueError, match="heads"):
        jvp(attend, *heads(2, k_heads=2))


@pytest.mark.parametrize(("name", "told"), [("flash", "not one of auto, kernel, reference"), ("kernel", "cannot compute this")])
def test_other_backends_are_refused(name, told):
    with pytest.raises(ValueError, match=told):
        jvp(attend, *heads(2), attention=name)


@torch.library.custom_op("stepdistill_tests::cube", mutates_args=())
def cube(x: torch.Tensor) -> torch.Tensor:
    """An operation of somebody's own, without a derivative, as fast attention kernels are."""
    return x**3


class Engine(nn.Module):
    """Calls what PyTorch does not see."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, dtype=F64))

    def forward(self, x):
        with torch._C.DisableTorchFunction():
            return x.detach() * self.weight


DROPS = {  # what the error names, and how to come by it; x [3] has a tangent
    "torch.Tensor.detach": lambda x: x.detach(),
    "torch.Tensor.detach_": lambda x: x.clone().detach_(),
    "torch.Tensor.data": lambda x: x.data,
    "torch.Tensor.item": lambda x: x[0].item(),
    "torch.Tensor.__float__": lambda x: float(x[0]),
    "torch.Tensor.__int__": lambda x: int(x[0]),
    "torch.Tensor.tolist": lambda x: torch.tensor(x.tolist()),
    "torch.Tensor.numpy": lambda x: torch.from_numpy(x.numpy()),
    "torch.Tensor.__array__": lambda x: torch.from_numpy(__import__("numpy").asarray(x)),
    "torch.Tensor.__dlpack": lambda x: torch.from_dlpack(x),
    "torch.Tensor.data_ptr": lambda x: x.data_ptr(),  # kernels in Triton ask for it
    "torch.Tensor.long": lambda x: x.long(),
    "torch.Tensor.to ": lambda x: x.to(torch.int32),
    "torch.Tensor.type ": lambda x: x.type(torch.int64),
    "torch.Tensor.argsort": lambda x: x.argsort(),
    "torch.tensor ": lambda x: torch.tensor(x),
    "torch.Tensor.new_tensor": lambda x: x.new_tensor(x),
    "torch.inference_mode": torch.inference_mode()(lambda x: x.sin()),
    "cube": cube,
    "Engine": Engine(),
}


@pytest.mark.parametrize("name", DROPS)
@pytest.mark.filterwarnings("ignore:To copy construct")
def test_a_dropped_tangent_is_an_error(name):
    """Even where another path has one, and the result would look right."""
    x = normal(3)
    with pytest.raises(RuntimeError, match=rf"{name}.*drops the tangent"):
        jvp(lambda x: x * 3 + DROPS[name](x), (x,), (x,))
    with torch.no_grad():
        DROPS[name](x)  # without a tangent, nothing is said


def test_what_has_no_derivative_by_right_is_no_error():
    x = normal(3)

    def f(x):
        steps = torch.ones_like(x).where(x > 0, x.new_zeros(3)) + x.floor().long()  # the tangent of floor is zero
        return x * steps + (5 if bool((x > 9).any()) else torch.empty_like(x).fill_(1)) * x.shape[0]

    _, slope = jvp(f, (x,), (x,))
    assert torch.equal(slope, x * ((x > 0) + x.floor()))


class Opaque(torch.autograd.Function):
    """With a gradient, but no forward derivative."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_a_missing_derivative_is_an_error():
    x = normal(3)
    with pytest.raises(RuntimeError, match="finite differences"):
        jvp(Opaque.apply, (x,), (x,))
    with pytest.raises(RuntimeError, match="nothing that has a tangent"):
        jvp(lambda x: x * 2, (x,), (None,))
    torch.testing.assert_close(jvp(lambda x: x**2, (x,), (x,))[1], 2 * x**2)


def test_nothing_stays_intercepted():
    x = normal(3)
    with pytest.raises(RuntimeError, match="detach"):
        jvp(lambda x: x.detach(), (x,), (x,))
    assert Engine()(x).requires_grad and torch.equal(x.detach(), x) and not torch.overrides._len_torch_function_stack()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_derivative_can_be_compiled_or_says_why_not(backend):
    inputs, tangents = heads(2)

    def plain(q, k, v):
        return attend(q * 2, k + 1, v).unflatten(-1, (2, 3)).flatten(-2).tanh()

    def broken(q, k, v):
        q = q * 2
        torch._dynamo.graph_break()
        return plain(q, k, v)

    def slope(f):
        return lambda *tensors: jvp(f, tensors[:3], tensors[3:])[1]

    torch._dynamo.reset()
    want = slope(plain)(*inputs, *tangents)
    torch.testing.assert_close(torch.compile(slope(plain), backend=backend)(*inputs, *tangents), want, rtol=0, atol=1e-13)
    for f, told in ((broken, "graph_break"), (lambda q, k, v: plain(q, k.detach(), v), "drops the tangent")):
        with pytest.raises(RuntimeError, match=told):  # in place of a wrong number
            torch.compile(slope(f), backend=backend)(*inputs, *tangents)
