"""The training loop. It knows players, losses and checkpoints, and nothing about any method."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from . import checkpoint, distributed
from .assemble import AVERAGE, Distillation, modules_of
from .batch import Draw
from .compiling import compile_blocks
from .data import Batches
from .errors import Diverged
from .optimizers import build_optimizer, load_moments, moments
from .roles import enable_checkpointing, worn


class Trainer:
    """One distillation in training: its optimizers, the stage it is in, and the next step `at`."""

    def __init__(self, distillation: Distillation, data: Batches):
        self.distillation, self.data = distillation, data
        self.recipe, self.roles, self.strategy = distillation.recipe, distillation.roles, distillation.strategy
        self.at, self.stage, self.opened, self.end = 0, None, 0, 0  # steps, and the stage from opened to before end
        self.players: dict[str, tuple[str, ...]] = {}
        self.params: dict[str, list[nn.Parameter]] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        nets = {id(role.net): role.net for role in self.roles.values()}.values()
        if self.recipe.train.checkpointing:
            for net in nets:
                enable_checkpointing(net)
        if self.recipe.train.compile:
            compile_blocks(nets, len(self.roles))

    def open(self, stage: int, enter: bool = True) -> None:
        """Begin a stage: let the strategy set values, open what its players train, make fresh optimizers."""
        if enter:
            self.opened = self.at
            self.strategy.enter(self.roles, stage)
        self.stage, self.players = stage, self.strategy.players(stage)
        steps = self.recipe.train.steps
        self.end = next((step for step in range(self.at, steps) if self.strategy.stage(step) != stage), steps)
        self.params = {who: modules_of(self.strategy, self.roles, names) for who, names in self.players.items()}
        everything = [p for role in self.roles.values() for p in role.parameters()]
        everything += [p for module in self.strategy.modules().values() for p in module.parameters()]
        trained = {id(p) for params in self.params.values() for p in params}
        for p in everything:
            p.requires_grad_(id(p) in trained)
        self.optimizers = {who: build_optimizer(params, self.recipe.optim) for who, params in self.params.items()}

    def step(self) -> dict[str, float]:
        """One iteration on one batch; returns what to log. Nobody moves unless every gradient is finite.

        Raises:
            Diverged: a loss or gradient is not finite; all weights are as before the step.
        """
        if (stage := self.strategy.stage(self.at)) != self.stage:
            self.open(stage)
        train, moved, logs = self.recipe.train, set(), {}
        for part in range(train.accumulate):
            batch, index = self.data(self.at, part)
            draw = Draw(train.seed, self.at, index, self.data.device)
            for who, loss, terms in self.strategy.losses(self.roles, batch, draw):
                self.between_yields()
                if not torch.isfinite(loss):
                    raise Diverged(who, "the loss", self.at)
                distributed.backward(loss / train.accumulate, self.params[who])
                moved.add(who)
                for name, value in terms.items():
                    key = f"{who}/{name}"
                    logs[key] = logs.get(key, 0.0) + value.detach() / train.accumulate
        norms = {who: self.gradient_norm(who) for who in sorted(moved)}
        for who, norm in norms.items():
            nn.utils.clip_grads_with_norm_(self.params[who], self.recipe.optim.clip, norm)
            for group in self.optimizers[who].param_groups:
                group["lr"] = self.rate(who)
            self.optimizers[who].step()
            self.optimizers[who].zero_grad(set_to_none=True)
            logs |= {f"{who}/grad_norm": norm, f"{who}/lr": self.rate(who)}
        self.strategy.after_step(self.roles, moved)
        self.average({name for who in moved for name in self.players[who]})
        self.at += 1
        return {name: float(value) for name, value in logs.items()}

    def between_yields(self) -> None:
        """A strategy that yields inside no_grad, or inside a role, would train something else than it says."""
        name = type(self.strategy).__name__
        if not torch.is_grad_enabled():
            raise RuntimeError(f"{name}.losses yielded inside no_grad; leave the block before yielding")
        for role in self.roles.values():
            if worn(role.net) is not None:
                raise RuntimeError(f"{name}.losses yielded while the network wears {worn(role.net)!r}")

    def gradient_norm(self, who: str) -> Tensor:
        """The norm over all parameters of a player, the same on every process."""
        held = [p for p in self.params[who] if p.grad is not None]
        if not held:
            raise RuntimeError(f"{type(self.strategy).__name__} gave player {who} a loss that reaches none of its parameters")
        distributed.mean_gradients(held)
        norm = nn.utils.get_total_norm([p.grad for p in held])
        if not torch.isfinite(norm):
            raise Diverged(who, f"the gradient of {self.name_of_bad_gradient(who)}", self.at)
        return norm

    def name_of_bad_gradient(self, who: str) -> str:
        names = {id(p): name for name, p in self.distillation.tensors().items()}
        for p in self.params[who]:
            if p.grad is not None and not torch.isfinite(p.grad).all():
                return names.get(id(p), "a module of the strategy")
        return "all parameters together (their norm overflows)"

    def rate(self, who: str) -> float:
        """Learning rate of a player at this step: warm-up since the stage began, constant or a cosine to the stage's end."""
        optim, done = self.recipe.optim, (self.at - self.opened) / max(1, self.end - self.opened)
        peak = optim.student_lr if who == "student" else optim.critic_lr
        warm = min(1.0, (self.at - self.opened + 1) / optim.warmup) if optim.warmup else 1.0
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done))) if optim.schedule == "cosine" else 1.0
        return peak * warm * cosine

    def average(self, moved: set[str]) -> None:
        """Let each average follow its role; early on with a shorter memory, or it would remember the start."""
        for name in moved:
            if name + AVERAGE in self.roles:
                age = self.at - self.opened
                decay = min(self.recipe.train.ema, (1 + age) / (10 + age))
                self.roles[name + AVERAGE].follow(self.roles[name], decay)

    def save(self, folder: Path) -> Path:
        """A checkpoint from which training goes on bit for bit."""
        tensors = self.distillation.tensors() | dict(self.moments())
        meta = {"stage": self.stage, "opened": self.opened}
        return checkpoint.save(folder, self.at, tensors, meta, self.recipe.train.keep)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint."""
        tensors, meta = checkpoint.load(path)
        self.distillation.load(tensors)
        self.at, self.opened = meta["step"], meta["opened"]
        if meta["stage"] is None:
            return
        self.open(meta["stage"], enter=False)
        for who, optimizer in self.optimizers.items():
            mark = f"optimizers/{who}/"
            load_moments(optimizer, {name.removeprefix(mark): x for name, x in tensors.items() if name.startswith(mark)})

    def moments(self) -> Iterator[tuple[str, Tensor]]:
        """The optimizers' state by name."""
        for who, optimizer in self.optimizers.items():
            yield from ((f"optimizers/{who}/{key}", x) for key, x in moments(optimizer))
