"""Optimizers: their state goes through a file and back bit for bit, also that of 8 bits."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from stepdistill import extras
from stepdistill.errors import UserError
from stepdistill.optimizers import build_optimizer, load_moments, moments
from stepdistill.sections import Optim

KINDS = ("adamw", "adamw8bit")


def params() -> list[nn.Parameter]:
    """Large ones, a convolution's of the order that families choose, a small one, and one that never learns."""
    torch.manual_seed(0)
    made = [nn.Parameter(torch.randn(shape)) for shape in [(64, 96), (32, 16, 3, 3), (8, 4), (70, 90)]]
    made[1].data = made[1].data.to(memory_format=torch.channels_last)
    return made


def names(own: list[nn.Parameter]) -> dict[int, str]:
    return {id(p): f"net/layer.{i}" for i, p in enumerate(own)}


def walk(optimizer: torch.optim.Optimizer, own: list[nn.Parameter], steps: range) -> None:
    """Steps with gradients that depend on the step alone; the last parameter gets none."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in own[:-1]:
            p.grad = torch.randn(p.shape, generator=generator).to(memory_format=torch.preserve_format)
        optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_state_that_was_saved_goes_on_bit_for_bit(kind, tmp_path):
    whole, first = params(), params()
    walk(build_optimizer(whole, Optim(optimizer=kind)), whole, range(5))
    optimizer = build_optimizer(first, Optim(optimizer=kind))
    walk(optimizer, first, range(3))
    save_file({name: x.contiguous() for name, x in moments(optimizer, names(first))}, tmp_path / "state.safetensors")
    again = build_optimizer(first, Optim(optimizer=kind))
    load_moments(again, names(first), load_file(tmp_path / "state.safetensors"))
    left, right = (dict(moments(one, names(first))) for one in (optimizer, again))
    assert left.keys() == right.keys()
    assert all(x.dtype == right[name].dtype and torch.equal(x, right[name]) for name, x in left.items())
    walk(again, first, range(3, 5))
    assert all(torch.equal(p, q) for p, q in zip(whole, first, strict=True))


def test_eight_bits_are_what_is_kept():
    own = params()
    optimizer = build_optimizer(own, Optim(optimizer="adamw8bit"))
    walk(optimizer, own, range(1))
    kept = {name: x for name, x in moments(optimizer, names(own))}
    assert {kept[f"net/layer.{i}/state{k}"].dtype for i in (0, 1) for k in (1, 2)} == {torch.uint8}
    assert {kept[f"net/layer.2/state{k}"].dtype for k in (1, 2)} == {torch.float32}  # small ones stay
    large = sum(x.nbytes for name, x in kept.items() if name.startswith("net/layer.0/") and "qmap" not in name)
    assert large == 2 * own[0].numel() + 2 * 4 * own[0].numel() // 256 + 8  # a byte each, a scale for each block, the step


def test_it_walks_where_adamw_walks():
    """The sign of the first step is exact; after some the two have moved alike."""
    ends = []
    for kind in KINDS:
        own = params()
        walk(build_optimizer(own, Optim(optimizer=kind, weight_decay=0.1)), own, range(4))
        ends.append(torch.cat([(p - q).flatten() for p, q in zip(own, params(), strict=True)]))
    full, low = ends
    assert torch.cosine_similarity(full, low, dim=0) > 0.99
    assert (full - low).norm() < 0.1 * full.norm()


def test_a_missing_package_is_told_with_its_extra(monkeypatch):
    monkeypatch.setattr(extras, "installed", lambda _name: False)
    with pytest.raises(UserError, match=r"optim.optimizer adamw8bit needs the package bitsandbytes.*'stepdistill\[quantize\]'"):
        build_optimizer(params(), Optim(optimizer="adamw8bit"))
    build_optimizer(params(), Optim())
