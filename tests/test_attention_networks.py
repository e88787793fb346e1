"""Derivatives through unmodified networks of many families, plain, compiled and sharded, against float64."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.distributed as dist
from networks import NETWORKS, Promoted, build, exact, normal
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from stepdistill.attention import jvp

CALLS = {  # of attention, by which of query, key and value have tangents: text has none
    "sd": {"111": 4, "100": 4},
    "sdxl": {"111": 8, "100": 8},
    "sd3": {"111": 3},
    "flux": {"111": 4},
    "wan 2.2": {"111": 4, "100": 4},  # one sample for each expert
    "pixart": {"111": 2, "100": 2},
    "sana": {"100": 2},  # attention to itself is linear there
    "qwen image": {"111": 2},
    "z image": {"111": 3, "000": 1},
    "lumina2": {"111": 3, "000": 1},
    "dit": {"111": 2},
    "ltx": {"111": 2, "100": 2},
    "cogvideox": {"111": 2},
    "hunyuan video": {"111": 2, "000": 1},  # the text's own
}


def off(x: Tensor, y: Tensor) -> float:
    """The relative error of x."""
    return float((x - y).norm() / y.norm())


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_differentiated_as_they_are(name):
    net, f, (x, t), (v, dt) = build(name)
    calls = Counter()
    with Promoted():
        value, slope = jvp(f, (x, t), (v, dt), calls=calls)
        with torch.no_grad():
            assert torch.allclose(value, f(x, t), rtol=0, atol=1e-12)
            h = 2e-6
            differences = (f(x + h * v, t + h * dt) - f(x - h * v, t - h * dt)) / (2 * h)
        for p in net.parameters():  # the stock derivative of group_norm knows no other layout
            p.data = p.data.clone(memory_format=torch.contiguous_format)
        _, want = exact(f, (x, t), (v, dt))
    assert want.norm() > 0 and not slope.requires_grad
    assert off(slope, want) < 1e-9
    assert off(slope, differences) < 1e-6
    assert calls == CALLS[name]


@pytest.mark.parametrize("name", NETWORKS)
def test_without_its_interception_a_network_has_no_derivative(name):
    """So that the test above cannot pass for another reason, and that nothing stays intercepted."""
    _, f, (x, t), _ = build(name)
    with Promoted(), torch.no_grad(), forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"forward AD|view size"):
        f(forward_ad.make_dual(x, x), forward_ad.make_dual(t, t))


@pytest.mark.parametrize("backend", ["_native_math", "_native_flash", "_native_cudnn"])
def test_the_dispatchers_native_backends_are_intercepted(backend):
    net, f, primals, tangents = build("flux")
    calls = Counter()
    _, want = jvp(f, primals, tangents)
    net.set_attention_backend(backend)
    try:
        _, slope = jvp(f, primals, tangents, calls=calls)
    finally:
        net.set_attention_backend("native")
    assert torch.equal(slope, want) and calls == CALLS["flux"]


def test_the_dispatchers_other_backends_are_an_error():
    net, f, primals, tangents = build("flux")
    net.set_attention_backend("flex")
    try:
        with pytest.raises(RuntimeError, match="unpack_dual"):  # flex vectorizes over heads, and nobody can look inside
            jvp(f, primals, tangents)
    finally:
        net.set_attention_backend("native")


def fused(graph, inputs):
    """A compiler's backend that loses tangents, as kernels do that it writes itself."""

    def run(*args):
        with torch._C.DisableTorchFunction():
            return [x.detach() if isinstance(x, Tensor) else x for x in graph(*args)]

    return run


COMPILED = {
    "the network": lambda net: net.compile(backend="eager"),
    "its blocks": lambda net: net.compile_repeated_blocks(backend="aot_eager"),
    "one block": lambda net: net.transformer_blocks[1].compile(backend=fused, fullgraph=True),
}


@pytest.mark.parametrize("how", COMPILED)
def test_what_is_compiled_is_differentiated_as_it_was_written(how):
    net, f, primals, tangents = build("ltx")
    value, slope = jvp(f, primals, tangents)
    torch._dynamo.reset()
    COMPILED[how](net)
    with torch.no_grad():
        f(*primals)  # compiles
    got = jvp(f, primals, tangents)
    assert torch.equal(got[0], value) and torch.equal(got[1], slope)
    if how == "one block":  # what jvp is kept from: an answer, but a wrong one
        assert off(exact(f, primals, tangents)[1], slope) > 0.01


def test_the_derivative_of_a_block_can_be_compiled():
    block, text = build("flux")[0].single_transformer_blocks[0], normal(2, 6, 32)
    primals, tangents = (normal(2, 16, 32), normal(2, 32, seed=1)), (normal(2, 16, 32, seed=2), normal(2, 32, seed=3))

    def slope(x, temb, v, dtemb):
        return jvp(lambda x, temb: block(x, text, temb)[1], (x, temb), (v, dtemb))[1]

    torch._dynamo.reset()
    got = torch.compile(slope, backend="aot_eager", fullgraph=True)(*primals, *tangents)
    assert off(got, slope(*primals, *tangents)) < 1e-12


def sharded(rank: int, world: int, rendezvous: str) -> None:
    """In one of `world` processes: each block's parameters are spread over all of them, and the derivative is the same."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    try:
        net, f, primals, tangents = build("ltx")
        calls = Counter()
        with Promoted():
            value, slope = jvp(f, primals, tangents)
            mesh = init_device_mesh("cpu", (world,))
            for block in net.transformer_blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(net, mesh=mesh)
            weight = net.transformer_blocks[0].attn1.to_q.lora_B.default.weight
            assert weight.to_local().numel() * world == weight.numel()
            got = jvp(f, primals, tangents, calls=calls)
        assert torch.equal(got[0], value) and torch.equal(got[1], slope) and calls == CALLS["ltx"]
    finally:
        dist.destroy_process_group()


def test_a_sharded_network_is_differentiated(tmp_path):
    sharded(0, 1, str(tmp_path / "rendezvous"))


@pytest.mark.long
def test_a_network_sharded_over_two_processes_is_differentiated(tmp_path):
    torch.multiprocessing.spawn(sharded, (2, str(tmp_path / "rendezvous")), nprocs=2)
