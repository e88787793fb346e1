"""A mixture of Gaussians in the plane, a small network that learned its flow, and distillation of it by any strategy."""

from __future__ import annotations

import copy
import functools
import math

import torch
from torch import Tensor, nn

from stepdistill.batch import Batch
from stepdistill.families import Family
from stepdistill.roles import Denoiser, Roles
from stepdistill.sampling import Inference, sample, trailing
from stepdistill.schedules import RectifiedFlow
from stepdistill.strategies import Strategy

FLOW, MODES, STD = RectifiedFlow(), 5, 0.15
ANGLES = 2 * math.pi * torch.arange(MODES) / MODES
MEANS = 1.4 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1)  # [MODES, 2], each as likely as the others


def points(n: int, generator: torch.Generator) -> Tensor:
    """Samples of the mixture [n, 2]."""
    which = torch.randint(MODES, (n,), generator=generator)
    return MEANS[which] + STD * torch.randn(n, 2, generator=generator)


def velocity(x_t: Tensor, t: Tensor) -> Tensor:
    """The mixture's exact flow E[eps - x0 | x_t] at times t [B] below 1 of points [B, 2]."""
    a, s = 1 - t[:, None], t[:, None]
    v = a**2 * STD**2 + s**2
    off = x_t[:, None] - a[..., None] * MEANS  # [B, MODES, 2]
    share = (-off.square().sum(-1) / (2 * v)).softmax(-1)[..., None]
    x0 = (share * (MEANS + (a * STD**2 / v)[..., None] * off)).sum(1)
    return (share * (s / v)[..., None] * off).sum(1) - x0


class Net(nn.Module):
    """x_t [B, 2], t [B] -> flow [B, 2]."""

    def __init__(self, width: int = 96):
        super().__init__()
        self.width, self.waves = width, math.pi * torch.arange(1, 5)
        self.body = nn.Sequential(
            *(nn.Linear(2 + 8, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        )
        self.last = nn.Linear(width, 2)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        wave = t[:, None] * self.waves
        return self.last(self.body(torch.cat([x_t, wave.sin(), wave.cos()], 1)))


class Plane(Family):
    """A family of such a network, without a pipeline."""

    pipeline = "none"

    def __init__(self, net: Net):
        self.schedule, self.kind, self.net = FLOW, "flow", net

    def encode_prompts(self, prompts):
        return {}

    def forward(self, net, x_t, t, cond):
        return net(x_t, t)

    def feature_block(self, net):
        return net.body

    def feature_tokens(self, out, _x_t, _cond):
        return out[:, None]  # one token

    def feature_width(self, net):
        return net.width


class Stream:
    """A Draw of one stream for the whole batch: quick, and as good where nothing is resumed."""

    size = 128  # of the batch

    def __init__(self, generator: torch.Generator, step: int):
        self.generator, self.step = generator, step

    def normal(self, like):
        return torch.randn(like.shape, generator=self.generator)

    def uniform(self, low=0.0, high=1.0):
        return low + (high - low) * torch.rand(self.size, generator=self.generator)

    def integer(self, low, high):
        return torch.randint(low, high, (self.size,), generator=self.generator)

    def choice(self, n):
        return int(torch.randint(n, (), generator=self.generator))


@functools.cache
def teacher() -> Net:
    """The network that learned the mixture's flow."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net()
    steps = 1500
    optimizer = torch.optim.AdamW(net.parameters(), 4e-3, betas=(0.9, 0.99), weight_decay=0)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        t = torch.rand(256, generator=generator) * 0.998 + 0.001
        x_t = (1 - t[:, None]) * points(256, generator) + t[:, None] * torch.randn(256, 2, generator=generator)
        optimizer.zero_grad()
        (net(x_t, t) - velocity(x_t, t)).square().mean().backward()
        optimizer.step()
        rate.step()
    return net.requires_grad_(False)


@functools.cache
def pairs(n: int = 4096) -> tuple[Tensor, Tensor]:
    """Noise, and where the teacher's ODE takes it in 100 steps, [n, 2] each."""
    noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(3))
    family = Plane(teacher())
    return noise, sample(Roles(family, teacher=Denoiser(family, family.net)), euler(100), noise, {}, null={})


def distil(strategy: Strategy, seed: int, steps: int, rate: float) -> Roles:
    """The roles after so many iterations on batches of 128; each student is the average of its last ones."""
    family, generator = Plane(teacher()), torch.Generator().manual_seed(seed)
    own = {name: Denoiser(family, copy.deepcopy(family.net), whole=True) for name in strategy.roles}
    roles = Roles(family, teacher=Denoiser(family, family.net), **own)
    students = [name for name in strategy.roles if name.startswith("student")]
    averages = {name: Denoiser(family, copy.deepcopy(family.net), whole=True) for name in students}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        strategy.setup(roles)
    stages = [strategy.stage(step) for step in range(steps)]
    for step, stage in enumerate(stages):
        moved, first = set(), stages.index(stage)
        if step == first:
            strategy.enter(roles, stage)
            params = {
                who: [p for name in names for p in (roles[name] if name in roles else strategy.modules()[name]).parameters()]
                for who, names in strategy.players(stage).items()
            }
            for p in (p for some in params.values() for p in some):
                p.requires_grad_()
            optimizers = {who: torch.optim.Adam(some, rate, betas=(0.5, 0.99)) for who, some in params.items()}
        x0 = points(Stream.size, generator) if "x0" in strategy.needs else None
        noise = torch.randn(Stream.size, 2, generator=generator)
        if "pairs" in strategy.needs:
            some = torch.randint(len(pairs()[0]), (Stream.size,), generator=generator)
            noise, x0 = (x[some] for x in pairs())
        batch = Batch(noise=noise, cond={}, null={}, x0=x0)
        for who, loss, _ in strategy.losses(roles, batch, Stream(generator, step)):
            loss.backward(inputs=params[who])
            moved.add(who)
        for who in moved:
            share = (step - first) / stages.count(stage)
            optimizers[who].param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * share))
            optimizers[who].step()
            optimizers[who].zero_grad()
        strategy.after_step(roles, moved)
        if "student" in moved:
            (student,) = (name for name in strategy.players(stage)["student"] if name in averages)
            averages[student].follow(roles[student], 0.98)
    return roles.swap(**averages)


def samples(roles: Roles, how: Inference, n: int, seed: int) -> Tensor:
    """Points [n, 2] that a role makes."""
    generator = torch.Generator().manual_seed(seed)
    stream = Stream(generator, 0)
    return sample(roles, how, torch.randn(n, 2, generator=generator), {}, stream.normal, {})


def euler(steps: int) -> Inference:
    """The teacher's own sampling."""
    return Inference(trailing(FLOW.grid(steps), "teacher"), renoise=False)


def apart(x: Tensor, y: Tensor | None = None) -> float:
    """The mean distance E|X - Y| of points [n, 2]; of one set's different points if y is None."""
    return torch.cdist(x, x if y is None else y).sum().item() / (len(x) * (len(x) - 1) if y is None else len(x) * len(y))


def shares(x: Tensor) -> Tensor:
    """The share of points [n, 2] within four standard deviations of each mode, [MODES]."""
    return (torch.cdist(x, MEANS) < 4 * STD).float().mean(0)
