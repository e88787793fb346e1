"""Derivatives through unmodified networks, against float64 mathematics and finite differences."""

from __future__ import annotations

import functools
import math

import diffusers
import peft
import pipelines
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from worlds import F64

from stepdistill.attention import jvp
attention=None
from stepdistill.families import FAMILIES
from stepdistill.roles import build_roles


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def heads(n=7, m=5, k_heads=4, d=8, e=6, dtype=F64):
    """Query [2, 4, n, d], key [2, k_heads, m, d], value [2, k_heads, m, e]."""
    return (
        normal(2, 4, n, d, dtype=dtype),
        normal(2, k_heads, m, d, seed=1, dtype=dtype),
        normal(2, k_heads, m, e, seed=2, dtype=dtype),
    )


SOME = normal(2, 1, 7, 5, seed=3) > -0.5
CALLS = {  # keyword arguments of a call, and of `heads`
    "plain": ({}, {}),
    "scale": ({"scale": 0.7}, {}),
    "causal": ({"is_causal": True}, {"n": 5}),
    "longer than its keys, causal": ({"is_causal": True}, {}),
    "bias": ({"attn_mask": normal(2, 1, 7, 5, seed=4)}, {}),
    "mask": ({"attn_mask": SOME}, {}),
    "no key left": ({"attn_mask": SOME & (torch.arange(7) != 2)[:, None]}, {}),
    "grouped": ({"enable_gqa": True}, {"k_heads": 2}),
}


@pytest.mark.parametrize("call", CALLS)
def test_attention_is_the_stock_function(call):
    how, sizes = CALLS[call]
    q, k, v = heads(**sizes)
    with sdpa_kernel(SDPBackend.MATH):
        want = F.scaled_dot_product_attention(q, k, v, **how)
    torch.testing.assert_close(attention(q, k, v, **how), want, rtol=0, atol=1e-13)
    if call == "no key left":
        assert not want[:, :, 2].any()


def test_attention_is_computed_in_float32_at_least():
    low = [x.bfloat16() for x in heads()]
    got, want = attention(*low), attention(*(x.double() for x in low))
    assert got.dtype == torch.bfloat16 and torch.equal(got, want.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention(*low), got)


def test_dropout_is_refused():
    with pytest.raises(ValueError, match="evaluation mode"):
        attention(*heads(), dropout_p=0.1)


@pytest.mark.parametrize("given", ["111", "100", "011", "010", "001"])
def test_derivative_of_attention_is_the_closed_form(given):
    """dO = P (dS - rowsum(P dS)) V + P dV with dS = (dQ K^T + Q dK^T) / sqrt(D); absent tangents are zeros."""
    inputs = heads()
    tangents = [
        normal(*x.shape, seed=5 + i) if bit == "1" else None for i, (x, bit) in enumerate(zip(inputs, given, strict=True))
    ]
    got, slope = jvp(F.scaled_dot_product_attention, inputs, tangents)
    q, k, v = inputs
    dq, dk, dv = (torch.zeros_like(x) if d is None else d for x, d in zip(inputs, tangents, strict=True))
    weights, logits = (q @ k.mT / math.sqrt(8)).softmax(-1), (dq @ k.mT + q @ dk.mT) / math.sqrt(8)
    turned = weights * (logits - (weights * logits).sum(-1, keepdim=True))
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v), rtol=0, atol=1e-13)
    torch.testing.assert_close(slope, turned @ v + weights @ dv, rtol=0, atol=1e-13)


@pytest.mark.parametrize("call", CALLS)
def test_derivative_of_masked_attention_is_finite_and_right(call):
    how, sizes = CALLS[call]
    inputs = heads(**sizes)
    tangents = [normal(*x.shape, seed=5 + i) for i, x in enumerate(inputs)]
    _, slope = jvp(functools.partial(F.scaled_dot_product_attention, **how), inputs, tangents)
    ahead, behind = (attention(*(x + h * d for x, d in zip(inputs, tangents, strict=True)), **how) for h in (1e-5, -1e-5))
    torch.testing.assert_close(slope, (ahead - behind) / 2e-5, rtol=0, atol=1e-8)


class Promoted(TorchFunctionMode):
    """Networks cast times and norms to float32, which would hide what is tested: float64 in its place."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is Tensor.float:
            return args[0].double()
        args = tuple(F64 if x is torch.float32 else x for x in args)
        return function(*args, **{key: F64 if x is torch.float32 else x for key, x in (kwargs or {}).items()})


def of_family(pipe):
    """The student of a pipeline's family, its LoRA filled with noise: a function of x_t and t, and the pictures' shape."""
    family = FAMILIES[type(pipe).__name__](pipe)
    roles = build_roles(family, ("student",), rank=4)
    cond = {name: x.double() for name, x in family.encode_prompts(["a red cat", "a blue dog"]).items()}
    stir(family.net)
    return family.net, lambda x, t: roles.student(x, t, cond).flow, family.latent_shape(16, 16)


def pixart():
    """A network without a family, with a LoRA that PEFT wears by itself."""
    torch.manual_seed(0)
    net = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, cross_attention_dim=16,
        sample_size=8, caption_channels=12, use_additional_conditions=False,
    )  # fmt: skip
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v"]), net)
    text, mask = normal(2, 6, 12, seed=8), torch.ones(2, 6)
    mask[1, 4:] = 0
    stir(net)
    call = {"encoder_hidden_states": text, "encoder_attention_mask": mask, "added_cond_kwargs": {}}
    return net, lambda x, t: net(x, timestep=1000 * t, **call).sample, (4, 8, 8)


@torch.no_grad()
def stir(net: nn.Module) -> None:
    for i, (name, p) in enumerate(net.named_parameters()):
        p.data = p.data.double()
        if "lora_B" in name:
            p.copy_(0.3 * normal(*p.shape, seed=i))
    for buffer in net.buffers():
        buffer.data = buffer.data.double() if buffer.is_floating_point() else buffer.data
    net.eval()


NETWORKS = {
    "sd": lambda: of_family(pipelines.sd()),
    "sdxl": lambda: of_family(pipelines.sdxl()),
    "sd3": lambda: of_family(pipelines.sd3()),
    "flux": lambda: of_family(pipelines.flux()),
    "wan 2.2": lambda: of_family(pipelines.wan(boundary_ratio=0.6)),
    "pixart": pixart,
}


def exact(f, primals, tangents) -> tuple[Tensor, Tensor]:
    """What PyTorch says where attention is its own mathematics."""
    with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        return forward_ad.unpack_dual(f(*(forward_ad.make_dual(x, v) for x, v in zip(primals, tangents, strict=True))))


@pytest.mark.parametrize("network", NETWORKS)
def test_networks_are_differentiated_as_they_are(network):
    net, f, shape = NETWORKS[network]()
    x, v, t, dt = (
        normal(2, *shape),
        normal(2, *shape, seed=1),
        torch.tensor([0.4, 0.7], dtype=F64),
        torch.tensor([0.3, -0.2], dtype=F64),
    )
    with Promoted():
        value, slope = jvp(f, (x, t), (v, dt))
        with torch.no_grad():
            assert torch.allclose(value, f(x, t), rtol=0, atol=1e-12)
            h = 2e-6
            differences = (f(x + h * v, t + h * dt) - f(x - h * v, t - h * dt)) / (2 * h)
        for p in net.parameters():
            p.data = p.data.clone(
                memory_format=torch.contiguous_format
            )  # the stock derivative of group_norm knows no other layout
        _, want = exact(f, (x, t), (v, dt))
    size = want.norm()
    assert size > 0 and not slope.requires_grad
    assert (slope - want).norm() < 1e-9 * size
    assert (slope - differences).norm() < 1e-6 * size


@pytest.mark.parametrize("network", NETWORKS)
def test_without_its_interception_a_network_has_no_derivative(network):
    """So that the test above cannot pass for another reason, and that nothing stays intercepted."""
    _, f, shape = NETWORKS[network]()
    x, t = normal(2, *shape), torch.tensor([0.4, 0.7], dtype=F64)
    with Promoted(), torch.no_grad(), forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"forward AD|view size"):
        f(forward_ad.make_dual(x, x), forward_ad.make_dual(t, t))


def test_channels_last_norms_have_a_derivative():
    x, v = (normal(2, 4, 3, 3, seed=i).to(memory_format=torch.channels_last) for i in range(2))
    f = functools.partial(F.group_norm, num_groups=2)
    want = exact(f, (x.contiguous(),), (v.contiguous(),))[1]
    torch.testing.assert_close(jvp(f, (x,), (v,))[1], want, rtol=0, atol=1e-13)


class Opaque(torch.autograd.Function):
    """An operation of somebody's own, as fast attention kernels are."""

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
    with pytest.raises(RuntimeError, match="lost on its way"):
        jvp(lambda x: x.detach() * 2, (x,), (x,))
    with pytest.raises(RuntimeError, match="lost on its way"):
        jvp(lambda x: x * 2, (x,), (None,))
    torch.testing.assert_close(jvp(lambda x: x**2, (x,), (x,))[1], 2 * x**2)


@pytest.mark.parametrize(("name", "told"), [("flash", "not one of auto, kernel, reference"), ("kernel", "no fused kernel")])
def test_other_backends_are_refused(name, told):
    with pytest.raises(ValueError, match=told):
        jvp(lambda x: x, (normal(3),), (normal(3),), attention=name)
