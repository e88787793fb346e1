"""What one evaluation of a network costs, measured on the real architecture without weights; and stand-ins that cost the
same, with which a strategy's own iterations run in milliseconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from .as_cuda import AsCuda
from .families.base import Family
from .live_bytes import LiveBytes
from .roles import Denoiser, Roles, wearing

HOST = "meta"
WEIGHT = {"int8": 1.0, "nf4": 0.5 + 4 / 64}  # bytes of a quantised weight; nf4 has a float32 scale for each 64


@dataclass(frozen=True)
class Cost:
    """Of one evaluation: bytes beyond weights, inputs and gradients; floating point operations."""

    forward: int  # peak of bytes while it runs
    kept: int  # of those, until backward
    backward: int  # peak of bytes while backward runs, with what was kept
    flops: int
    flops_backward: int  # with what checkpointing replays
    tokens: tuple[int, ...]  # shape of what a discriminator reads of one sample


@dataclass
class Costs:
    """Measures evaluations of a family's network, each kind once. cond: a prompt's rows, each [1, ...]."""

    family: Family
    student: Denoiser
    cond: dict[str, Tensor]
    live: LiveBytes
    precision: torch.dtype | None = None
    seen: dict[tuple[int, bool], Cost] = field(default_factory=dict)

    def __call__(self, rows: int, grad: bool) -> Cost:
        """Of `rows` samples at once; with a gradient of the adapter, or (grad false) without any."""
        if not grad and rows > 1:  # nothing is kept: all of it grows with the rows
            one = self(1, False)
            return Cost(one.forward * rows, one.kept * rows, 0, one.flops * rows, 0, one.tokens)
        if (rows, grad) not in self.seen:
            self.seen[rows, grad] = self.measure(rows, grad)
        return self.seen[rows, grad]

    def measure(self, rows: int, grad: bool) -> Cost:
        family, live, net = self.family, self.live, self.student.net
        params = self.student.parameters()
        for p in params:
            p.requires_grad_(grad)
            p.grad = torch.empty_like(p) if grad else None  # there before: what is measured is what comes and goes
        live.hold(net.parameters())
        cond = {name: x.expand(rows, *x.shape[1:]) for name, x in self.cond.items()}
        x_t, t = torch.empty(rows, *family.shape, device=HOST), torch.empty(rows, device=HOST)
        shapes: list[tuple[int, ...]] = []
        block = family.feature_block(net)
        handle = block.register_forward_hook(lambda _m, _a, out: shapes.append(family.feature_tokens(out, x_t, cond).shape[1:]))
        live.lap()
        before, flops = live.now, live.flops
        with AsCuda(self.precision):
            with torch.set_grad_enabled(grad), wearing(net, self.student.adapter):
                raw = family.forward(net, x_t, t, cond)
            handle.remove()
            forward, kept, middle = live.lap() - before, live.now - before, live.flops
            if grad:  # not Tensor.backward: that would leave AsCuda while checkpointed blocks are replayed
                run_backward = torch.autograd.graph._engine_run_backward
                inputs = [p for p in params if p.requires_grad]
                run_backward(
                    (raw,), (torch.empty_like(raw),), False, False, tuple(inputs), allow_unreachable=True, accumulate_grad=True
                )
        backward = live.lap() - before
        for p in params:
            p.grad = None
            p.requires_grad_(False)
        return Cost(forward, kept, backward if grad else 0, middle - flops, live.flops - middle, shapes[0])


class Evaluation(torch.autograd.Function):
    """Costs what an evaluation costs, and computes nothing."""

    @staticmethod
    def forward(ctx, told: Told, weight: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor]:
        ctx.told, ctx.like = told, weight
        told.live.spike(told.cost.forward)
        if told.cost.kept and told.grad:
            ctx.kept = torch.empty(told.cost.kept, dtype=torch.uint8, device=HOST)
        return torch.empty_like(x_t), x_t.new_empty(len(x_t), *told.cost.tokens)

    @staticmethod
    def backward(ctx, *_grads: Tensor) -> tuple[None, Tensor, Tensor]:
        told, ctx.kept = ctx.told, None
        told.live.spike(told.cost.backward)
        told.count("backward")
        return None, ctx.like.new_empty(()).expand_as(ctx.like), told.like.new_empty(()).expand_as(told.like)

    @staticmethod
    def jvp(ctx, *_tangents: Tensor) -> tuple[Tensor, Tensor]:
        told = ctx.told
        return torch.empty_like(told.like), told.like.new_empty(len(told.like), *told.cost.tokens)


@dataclass
class Told:
    """What an Evaluation is about."""

    live: LiveBytes
    cost: Cost
    grad: bool
    like: Tensor  # x_t
    counts: Counter[tuple[str, str]]
    role: str

    def count(self, kind: str) -> None:
        self.counts[self.role, kind] += len(self.like)
        self.counts["passes", kind] += 1
        self.counts["flops", kind] += self.cost.flops_backward if kind == "backward" else self.cost.flops


class Standin(nn.Module):
    """In a role's place: as many weights in one tensor (the teacher: none), and the counts of its evaluations."""

    def __init__(self, role: str, size: int):
        super().__init__()
        self.role = role
        weight = torch.empty(size, device=HOST)
        self.weight = nn.Parameter(weight, requires_grad=False) if size else weight
        self.block = nn.Identity()  # whose output a discriminator reads


class StandinFamily:
    """A family whose network costs what the real one costs, and counts who was asked: (role, "forward") -> samples."""

    def __init__(self, costs: Costs):
        self.costs, self.counts = costs, Counter()
        self.net = Standin("teacher", 0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.costs.family, name)

    def forward(self, net: Standin, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        tangent = forward_ad.unpack_dual(x_t).tangent if forward_ad._current_level >= 0 else None
        grad = torch.is_grad_enabled() and (x_t.requires_grad or net.weight.requires_grad)
        cost = self.costs(len(x_t), grad)
        told = Told(self.costs.live, cost, grad, x_t, self.counts, net.role)
        told.count("forward")
        if tangent is not None:  # a derivative beside the value: as much again
            told.count("forward")
            self.costs.live.spike(2 * cost.forward)
        raw, tokens = Evaluation.apply(told, net.weight, x_t)
        net.block(tokens)
        return raw

    def feature_block(self, net: Standin) -> nn.Module:
        return net.block

    def feature_tokens(self, out: Tensor, *_: Any) -> Tensor:
        return out

    def feature_width(self, net: Standin) -> int:
        return self.costs.family.feature_width(self.costs.student.net)

    def decode(self, latents: Tensor) -> Tensor:
        height, width = self.costs.family.size
        return latents.new_empty(len(latents), 3, height, width) + latents.sum() * 0

    def add_guidance_embedding(self, net: Standin) -> None:
        """Too small to count."""


def standin_roles(family: StandinFamily, names: tuple[str, ...], size: int) -> Roles:
    """The teacher, and a role for each name with `size` weights."""
    made = {name: Denoiser(family, Standin(name, size), whole=True) for name in names}
    return Roles(family, teacher=Denoiser(family, family.net, whole=True), **made)


@contextmanager
def noted(strategy: Any, live: LiveBytes, peaks: dict[str, int]) -> Iterator[None]:
    """While it lasts, `peaks` learns the most bytes in each player's part of an iteration."""
    losses = strategy.losses

    def watched(*args: Any) -> Iterator[Any]:
        live.lap()
        for item in losses(*args):
            yield item  # its backward runs here
            peaks[item[0]] = max(peaks.get(item[0], 0), live.lap())

    strategy.losses = watched
    try:
        yield
    finally:
        del strategy.losses


def weigh(module: nn.Module, quantize: str | None = None) -> int:
    """Bytes of a module's weights and buffers; quantised, those of its linear layers are smaller."""
    whole = {id(x): x.numel() * x.element_size() for x in (*module.parameters(), *module.buffers())}
    if quantize:
        for name, m in module.named_modules():
            if isinstance(m, nn.Linear) and "lora_" not in name:
                whole[id(m.weight)] = round(m.weight.numel() * WEIGHT[quantize])
    return sum(whole.values())
