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
from .errors import Diverged, Exploded
from .optimizers import build_optimizer, load_moments, moments
from .roles import enable_checkpointing, worn
from .timing import Times
from .watch import Watch


class Trainer:
    """One distillation in training: its optimizers, the stage it is in, and the next step `at`."""

    def __init__(self, distillation: Distillation, data: Batches, times: Times | None = None):
        self.distillation, self.data = distillation, data
        self.times = times or Times(distributed.device())
        self.recipe, self.roles, self.strategy = distillation.recipe, distillation.roles, distillation.strategy
        self.at, self.stage, self.opened, self.end = 0, None, 0, 0  # steps, and the stage from opened to before end
        self.skips = 0  # iterations that were left out in a row, up to this one
        self.skipped: tuple[str, str] | None = None  # why the last one was: the player, and what of it was not finite
        self.intact = True  # not in the midst of a step that some have taken and others not
        self.watch = Watch(self.recipe.train.explosion)
        self.players: dict[str, tuple[str, ...]] = {}
        self.params: dict[str, list[nn.Parameter]] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.names = {id(p): name for name, p in distillation.parameters().items()}
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
        """One iteration on one batch; returns what to log, means over processes. Nobody moves unless every loss and gradient is
        finite on all of them; if not, the iteration is left out, up to train.skip in a row, and `skipped` tells why.

        Raises:
            Diverged: a loss or gradient is not finite, once too often; all weights and buffers are as before the step.
            Exploded: losses are train.explosion times their usual size.
        """
        if (stage := self.strategy.stage(self.at)) != self.stage:
            self.open(stage)
            self.watch.forget()
        before = {name: x.clone() for name, x in self.buffers().items()}
        try:
            losses, terms = self.backward()
            norms = {who: self.gradient_norm(who) for who in sorted(losses)}
            losses, terms, norms = numbers(losses, terms, norms)
        except Exception:  # memory ran out, data has vanished: what is saved now is as before
            self.undo(before)
            raise
        self.skipped = self.not_finite(losses, norms)
        if self.skipped:
            return self.leave_out(before)
        self.intact = False
        for who, norm in norms.items():
            self.move(who, norm)
            terms |= {f"{who}/grad_norm": norm, f"{who}/lr": self.rate(who)}
        self.strategy.after_step(self.roles, set(norms))
        self.average({name for who in norms for name in self.players[who]})
        self.at, self.skips, self.intact = self.at + 1, 0, True
        if exploded := self.watch(losses):
            raise Exploded(*exploded, self.at)
        return terms

    def backward(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Gradients of one batch for every player that gets a loss; the losses, by player, and their terms, to be logged.

        No number is looked at here: that would wait for the device, and a process that gave up alone would leave the others
        waiting for it.
        """
        train = self.recipe.train
        losses: dict[str, Tensor] = {}
        logs: dict[str, Tensor] = {}
        for part in range(train.accumulate):
            with self.times("data"):
                batch, index = self.data(self.at, part)
            draw = Draw(train.seed, self.at, index, self.data.device)
            for who, loss, terms in self.strategy.losses(self.roles, batch, draw):
                self.between_yields()
                others = [p for other, params in self.params.items() if other != who for p in params]
                distributed.backward(loss / train.accumulate, self.params[who], others)
                losses[who] = losses.get(who, 0.0) + loss.detach() / train.accumulate
                self.times.lap(who)
                for name, value in terms.items():
                    key = f"{who}/{name}"
                    logs[key] = logs.get(key, 0.0) + value.detach() / train.accumulate
        return losses, logs

    def move(self, who: str, norm: float) -> None:
        """One step of a player's optimizer, along gradients of this norm."""
        distributed.clip([p for p in self.params[who] if p.grad is not None], norm, self.recipe.optim.clip)
        for group in self.optimizers[who].param_groups:
            group["lr"] = self.rate(who)
        self.optimizers[who].step()
        self.optimizers[who].zero_grad(set_to_none=True)
        self.times.lap(who)

    def not_finite(self, losses: dict[str, float], norms: dict[str, float]) -> tuple[str, str] | None:
        """Player and tensor of the first loss or gradient that is not finite, the same on all processes; None: all are."""
        for who, loss in losses.items():
            if not math.isfinite(loss):
                return who, "the loss"
        for who, norm in norms.items():
            if not math.isfinite(norm):
                return who, f"the gradient of {self.name_of_bad_gradient(who)}"
        return None

    def leave_out(self, before: dict[str, Tensor]) -> dict[str, float]:
        """Undo an iteration in which nobody has moved yet, and go on with the next one; nothing is logged.

        Raises:
            Diverged: it would be one more in a row than train.skip.
        """
        self.undo(before)
        if self.skips == self.recipe.train.skip:
            raise Diverged(*self.skipped, self.at)
        self.at, self.skips = self.at + 1, self.skips + 1
        return {}

    def undo(self, before: dict[str, Tensor]) -> None:
        """Forget the gradients of an iteration in which nobody has moved, and put buffers back."""
        for name, x in self.buffers().items():
            x.copy_(before[name])
        for params in self.params.values():
            for p in params:
                p.grad = None

    def buffers(self) -> dict[str, Tensor]:
        """What the strategy's modules keep beside parameters, as f-distill its averages: computing a loss changes it."""
        return {f"{key}/{name}": x for key, module in self.strategy.modules().items() for name, x in module.named_buffers()}

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
        distributed.mean_gradients(self.params[who])
        held = [p for p in self.params[who] if p.grad is not None]
        if not held:
            raise RuntimeError(f"{type(self.strategy).__name__} gave player {who} a loss that reaches none of its parameters")
        return distributed.norm(p.grad for p in held)

    def name_of_bad_gradient(self, who: str) -> str:
        """All processes ask, parameter by parameter: where gradients are sharded, one alone holds what is not finite."""
        for p in self.params[who]:
            if distributed.anyone(p.grad is not None and not bool(torch.isfinite(distributed.local(p.grad)).all())):
                return self.names[id(p)]
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

    def save(self, folder: Path, score: float | None = None) -> Path:
        """A checkpoint from which training goes on bit for bit; score: what it is worth, the lower the better, if known."""
        tensors = self.distillation.tensors() | dict(self.moments())
        meta = {"stage": self.stage, "opened": self.opened, "skips": self.skips, "watch": self.watch.state(), "score": score}
        return checkpoint.save(folder, self.at, tensors, meta, self.recipe.train.keep)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint."""
        tensors, meta = checkpoint.load(path)
        self.distillation.load(tensors)
        self.at, self.opened, self.skips = meta["step"], meta["opened"], meta.get("skips", 0)
        self.watch.load(meta.get("watch", {}))
        if meta["stage"] is None:
            return
        self.open(meta["stage"], enter=False)
        for who, optimizer in self.optimizers.items():
            mark = f"optimizers/{who}/"
            saved = {name.removeprefix(mark): tensors[name] for name in tensors if name.startswith(mark)}
            load_moments(optimizer, self.names, saved)

    def moments(self) -> Iterator[tuple[str, Tensor]]:
        """The optimizers' state by name."""
        for who, optimizer in self.optimizers.items():
            yield from ((f"optimizers/{who}/{key}", x) for key, x in moments(optimizer, self.names))


def numbers(*groups: dict[str, Tensor]) -> tuple[dict[str, float], ...]:
    """Named scalars as numbers, means over processes: one message between them, after which the device is waited for.

    What is not finite on one of them is not finite on any. All processes give the same names in the same order.
    """
    values = [x.float().reshape(()) for group in groups for x in group.values()]
    if not values:
        return groups
    means = iter(distributed.mean(torch.stack(values)).unbind())  # no tolist, of which `plan` has none
    return tuple({name: float(next(means)) for name in group} for group in groups)


def checkpoint_bytes(distillation: Distillation) -> int:
    """About what a checkpoint takes on disk: weights, and two moments of all that may be trained."""
    tensors = distillation.tensors()
    trained = {name: x for name, x in tensors.items() if f"{AVERAGE}/" not in name}
    return checkpoint.size(tensors) + 2 * checkpoint.size(trained)
