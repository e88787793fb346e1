"""Bytes that live are counted as they come and go, on the CPU and where there is no memory at all."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stepdistill.as_cuda import AsCuda
from stepdistill.live_bytes import LiveBytes


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_is_dropped_no_longer_counts(device):
    with LiveBytes(device) as live:
        a = torch.empty(1000, device=device)
        b = a.view(10, 100).T  # the same storage
        c = a + 1
        assert live.now == 8000
        del a, b
        assert (live.now, live.peak, live.lap()) == (4000, 8000, 8000)
        assert live.lap() == 4000
        del c
        assert live.now == 0


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_a_graph_keeps_counts_until_backward(device):
    w = torch.ones(50, 50, device=device, requires_grad=True)
    x = torch.ones(40, 50, device=device)
    with LiveBytes(device) as live:
        assert live.hold([w, x, w]) == 4 * (2500 + 2000)
        y = (x @ w).exp().sum()  # exp keeps its result
        assert live.now == 4 * (2500 + 2000 + 2000 + 1)
        y.backward()
        del y
        assert live.now == 4 * (2500 + 2000 + 2500)  # and the weight's gradient
        assert live.flops == 2 * 2 * 40 * 50 * 50


def test_a_tensor_without_numbers_says_one():
    with LiveBytes(), torch.device("meta"):
        assert (
            bool(torch.isfinite(torch.empty(3)).all()) and float(torch.empty(())) == 1.0 and torch.empty(2, dtype=int)[0] == 1
        )


def test_attention_keeps_no_square():
    q = torch.empty(1, 2, 512, 16, device="meta", requires_grad=True)
    sizes = {}
    for name, mode in (("plain", LiveBytes()), ("fused", LiveBytes())):
        with mode as live, AsCuda() if name == "fused" else LiveBytes("cpu"):
            out = F.scaled_dot_product_attention(q, q, q)
            sizes[name] = live.peak
        del out
    row = 2 * 512 * 4
    assert sizes["plain"] > 512 * row
    assert 17 * row <= sizes["fused"] < 20 * row  # the output, and one number a row


def test_autocast_is_cudas():
    x, linear = torch.empty(2, 8, device="meta"), nn.Linear(8, 8, device="meta")
    with AsCuda(torch.bfloat16):
        y = linear(x)
        assert (y.dtype, F.layer_norm(y, (8,)).dtype, (y + x).dtype) == (torch.bfloat16, torch.float32, torch.float32)
    with AsCuda():
        assert linear(x).dtype == torch.float32


def test_numbers_that_are_not_there_are_ones():
    with LiveBytes():
        x = torch.empty(2, device="meta")
        assert x[0].item() == 1.0
        assert x.to("cpu", torch.float64).tolist() == [1.0, 1.0]
        assert x.double().is_meta
