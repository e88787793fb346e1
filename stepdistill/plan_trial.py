"""A strategy's own iterations with stand-ins for its networks: what they would cost, without a number computed."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .assemble import AVERAGE, Distillation, trained
from .batch import Batch, Draw
from .costs import HOST, Costs, StandinFamily, noted, standin_roles, weigh
from .recipe import Recipe
from .trainer import Trainer

ITERATIONS = 20  # that are tried: every part of a strategy's cadence is among them
COUNTED = 60  # whose evaluations are averaged
PACE = math.sqrt(1025)  # its multiples modulo 1 fill [0, 1) evenly, at every cadence to 10


@dataclass(frozen=True)
class Tried:
    """What was found by running a strategy with stand-ins."""

    roles: tuple[str, ...]
    heads: int  # bytes of the strategy's own modules
    learning: int  # numbers that have gradients and moments
    players: dict[str, int]
    evaluations: dict[tuple[str, str], float]
    flops: float
    passes: tuple[float, float]  # through a network in an iteration, forward and backward, however many samples in each
    moves: dict[str, tuple[int, float]]  # player -> numbers that it learns, and how often it moves in an iteration


def try_out(recipe: Recipe, costs: Costs, size: int) -> Tried:
    """Run the strategy's own iterations where every evaluation costs what it costs and computes nothing."""
    strategy, train, live = copy.deepcopy(recipe.strategy), recipe.train, costs.live
    family = StandinFamily(costs)
    averaged = tuple(name + AVERAGE for name in trained(strategy) if train.ema is not None)
    names = (*strategy.roles, *averaged)
    roles = standin_roles(family, names, size)
    with torch.device(HOST):
        strategy.setup(roles)
    for module in strategy.modules().values():
        module.to(HOST)
    heads = sum(map(weigh, strategy.modules().values()))
    parts = min(train.accumulate, 2)  # from the second on, gradients of the first are there
    plain = dataclasses.replace(
        recipe,
        strategy=strategy,
        train=dataclasses.replace(train, checkpointing=False, accumulate=parts),
        optim=plain_optimizer(recipe),
    )
    data = Meta(costs, strategy.needs, train.batch // train.accumulate)
    trainer = Trainer(Distillation(plain, family, strategy, roles), data)
    live.hold(p for role in roles.values() for p in role.parameters())
    peaks: dict[str, int] = {}
    stages, learning, start = stage_lengths(strategy, train.steps), 0, live.now
    evaluations: Counter[tuple[str, str]] = Counter()
    moved: Counter[str] = Counter()
    numbers: dict[str, int] = {}
    for first, length in stages:
        trainer.at = first
        with noted(strategy, live, peaks):
            for _ in range(min(length, max(1, ITERATIONS // len(stages)))):
                trainer.step()
        learning = max(learning, sum(p.numel() for params in trainer.params.values() for p in params))
        done = min(length, max(1, COUNTED // len(stages)))
        family.counts.clear()
        for step in range(first, first + done):
            players = set()
            for who, loss, _ in strategy.losses(roles, data(step, 0)[0], Even(train.seed, step, range(data.rows), HOST)):
                loss.backward()
                players.add(who)
            moved.update({who: length / train.steps / done for who in players})
            for optimizer in trainer.optimizers.values():
                optimizer.zero_grad()
        numbers |= {who: max(numbers.get(who, 0), sum(p.numel() for p in params)) for who, params in trainer.params.items()}
        weight = length / train.steps / done * train.accumulate
        evaluations.update({key: n * weight for key, n in family.counts.items()})
    passes = tuple(evaluations.pop(("passes", kind), 0.0) for kind in ("forward", "backward"))
    moves = {who: (n, moved[who]) for who, n in numbers.items()}
    state = sum(x.numel() * x.element_size() for _, x in trainer.moments())
    flops = evaluations.pop(("flops", "forward"), 0) + evaluations.pop(("flops", "backward"), 0)
    fixed = start + state + 4 * learning
    return Tried(
        names, heads, learning, {who: max(0, n - fixed) for who, n in peaks.items()}, dict(evaluations), flops, passes, moves
    )


def plain_optimizer(recipe: Recipe) -> Any:
    """AdamW of PyTorch, whose state is as many numbers as that of its 8-bit copies."""
    return dataclasses.replace(recipe.optim, optimizer="adamw")


def stage_lengths(strategy: Any, steps: int) -> list[tuple[int, int]]:
    """First iteration and length of every stage."""
    edges = [at for at in range(steps) if at == 0 or strategy.stage(at) != strategy.stage(at - 1)]
    return [(at, end - at) for at, end in zip(edges, [*edges[1:], steps], strict=True)]


@dataclass
class Meta:
    """Batches without numbers."""

    costs: Costs
    needs: frozenset[str]
    rows: int
    device: str = HOST

    def __call__(self, step: int, part: int) -> tuple[Batch, range]:
        family, rows = self.costs.family, self.rows
        cond = {name: x.to(HOST).expand(rows, *x.shape[1:]) for name, x in self.costs.cond.items()}
        noise = torch.empty(rows, *family.shape, device=HOST)
        x0 = torch.empty_like(noise) if self.needs & {"x0", "pairs"} else None
        null = None if family.guidance_distilled else cond
        return Batch(noise, cond, null, x0, ("",) * rows), range(part * rows, (part + 1) * rows)


class Even(Draw):
    """Choices spread evenly over the iterations, so that few of them give the average; noise that is only a shape."""

    calls = 0

    def choice(self, n: int) -> int:
        self.calls += 1
        return int((self.step * PACE + self.calls * math.sqrt(2)) % 1 * n)

    def normal(self, like: Tensor) -> Tensor:
        return torch.empty_like(like, device=HOST)
