"""Compiled blocks over all roles: the numbers of what was written, no silent way back to it, features and replays included."""

from __future__ import annotations

import pytest
import torch
from plane import Plane
from torch import nn

from stepdistill import compiling
from stepdistill.compiling import compile_blocks, repeated_blocks
from stepdistill.roles import build_roles, enable_checkpointing


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x, t):
        return x + torch.tanh(self.linear(x + t))


class Net(nn.Module):
    """x_t [B, 2], t [B] -> [B, 2], through two blocks that repeat."""

    width = 6

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(2, 6), nn.Linear(6, 2)
        self.blocks = nn.ModuleList([Block(6), Block(6)])
        self.run = lambda block, *args: block(*args)

    def forward(self, x, t):
        x = self.first(x)
        for block in self.blocks:
            x = self.run(block, x, t[:, None])
        return self.last(x)

    def enable_gradient_checkpointing(self, run):
        self.run = run


class Blocks(Plane):
    def feature_block(self, net):
        return net.blocks[1]

    def feature_tokens(self, out, *_shapes):
        return out[:, None]


NAMES = ("student", "fake", "target", "student_1", "student_2")


@pytest.fixture
def roles(monkeypatch):
    """Five LoRAs over such a network, and what a backend of the compiler was given, in `graphs`."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    made = build_roles(Blocks(Net()), NAMES, 2, ["linear"])
    for name in NAMES:
        for key, p in made[name].named_parameters().items():
            p.requires_grad_()
            if "lora_B" in key:
                p.data.normal_(0, 0.3)
    made.graphs = []
    monkeypatch.setattr(compiling, "BACKEND", lambda graph, _inputs: made.graphs.append(graph) or graph.forward)
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False, skip_nnmodule_hook_guards=True):
        yield made
    torch._dynamo.reset()


X, T = torch.randn(3, 2, generator=torch.Generator().manual_seed(1)), torch.tensor([0.2, 0.5, 0.9])


def turns(roles):
    """Numbers that every role has a part in, with and without a gradient, features and a doubled batch, and gradients."""
    student = roles.student(X, T, {})
    p, tokens = roles.fake.features(student.x0, T, {})
    with torch.no_grad():
        others = roles.teacher.guided(student.x0, T, {}, {}, 2.0).x0 + sum(roles[name](X, T, {}).x0 for name in NAMES)
    loss = (student.x0 * others).mean() + p.x0.square().mean() + tokens.square().mean()
    return loss, *torch.autograd.grad(loss, roles.student.parameters() + roles.fake.parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_roles_give_what_was_written(roles, checkpointing):
    want = turns(roles)
    if checkpointing:
        enable_checkpointing(roles.teacher.net)
    compile_blocks([roles.teacher.net], len(roles))
    for got, number in zip(turns(roles), want, strict=True):
        torch.testing.assert_close(got, number, rtol=1e-5, atol=1e-6)
    counted = len(roles.graphs)
    assert counted > 8  # more than PyTorch compiles by itself
    for got, number in zip(turns(roles), want, strict=True):
        torch.testing.assert_close(got, number, rtol=1e-5, atol=1e-6)
    assert len(roles.graphs) == counted  # the next iteration compiles nothing


def test_more_than_the_limit_is_an_error(roles, monkeypatch):
    monkeypatch.setattr(compiling, "VARIANTS", 0)
    compile_blocks([roles.teacher.net], len(roles))
    with pytest.raises(Exception, match="recompile_limit"):
        turns(roles)


def test_which_blocks_are_repeated():
    class Named(Net):
        _repeated_blocks = ("Linear",)

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = Net(), Net()

    net, experts = Named(), Experts()
    assert repeated_blocks(net) == [m for m in net.modules() if isinstance(m, nn.Linear)]
    assert repeated_blocks(experts) == [*experts.one.blocks, *experts.two.blocks]
