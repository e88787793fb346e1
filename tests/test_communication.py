"""What processes send each other, counted on real ones; and the arithmetic of rings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import world
from students import student

from stepdistill.assemble import assemble
from stepdistill.communication import Call, Link, replicated, seconds, sent, sharded
from stepdistill.data import build_batches
from stepdistill.recipe import load_recipe
from stepdistill.trainer import Trainer

SMALL = 1024  # bytes: numbers for the log, flags
NEW = hasattr(dist, "all_gather_single")  # what FSDP2 calls, in newer versions of PyTorch and in older ones
NAMES = {
    "all-gather": "all_gather_single" if NEW else "all_gather_into_tensor",
    "reduce-scatter": "reduce_scatter_single" if NEW else "reduce_scatter_tensor",
}


def counted(names, action) -> list[tuple[str, int]]:
    """The collectives of torch.distributed, by name and bytes of the whole tensor, that an action calls."""
    seen, honest = [], {name: getattr(dist, name) for name in names}

    def count(name):
        def call(*args, **kw):
            tensors = [x for x in (*args, *kw.values()) if isinstance(x, torch.Tensor)]
            seen.append((name, max(x.numel() * x.element_size() for x in tensors)))
            return honest[name](*args, **kw)

        return call

    for name in names:
        setattr(dist, name, count(name))
    try:
        action()
    finally:
        for name in names:
            setattr(dist, name, honest[name])
    return seen


def train_two_steps(recipe: Path):
    """Bytes of each all-reduce of two iterations; the numbers that each player learns, and how many tensors they are in."""
    distillation = assemble(load_recipe(recipe))
    made = Trainer(distillation, build_batches(distillation.recipe, distillation.family))
    steps = [[size for _, size in counted(["all_reduce"], made.step)] for _ in range(2)]
    return steps, {who: (sum(p.numel() for p in params), len(params)) for who, params in made.params.items()}


def test_replicas_average_the_gradients_of_who_moves_and_next_to_nothing_else(tmp_path):
    overrides = ("data.count=4", "train.batch=2", "train.steps=2")
    student(tmp_path, "eps", *overrides, strategy="{name: dmd2, student_every: 2}")
    for steps, learns in world(2, train_two_steps, tmp_path / "run" / "recipe.yaml"):
        (student_s, flags), (critic_s, more) = learns["student"], learns["critic"]
        expected = replicated({"student": (student_s, 0.5), "critic": (critic_s, 1.0)})
        large = [sorted(size for size in sizes if size > SMALL) for sizes in steps]
        flagged = [call.size + 4 * tensors for call, tensors in zip(expected, (flags, more), strict=True)]
        assert large == [sorted(flagged), [4 * (critic_s + more)]]
        assert [call.size * call.times for call in expected] == [2 * student_s, 4 * critic_s]
        assert all(sum(size for size in sizes if size <= SMALL) <= SMALL for sizes in steps)


def pass_through_shares(learn: bool):
    """Collectives of one forward pass without, and one with its backward, through four sharded layers."""
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(32, 32, bias=False).requires_grad_(learn) for _ in range(4)))
    mesh = init_device_mesh("cpu", (2,))
    for layer in net:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(net, mesh=mesh, reshard_after_forward=True)

    def passes():
        with torch.no_grad():
            net(torch.ones(2, 32))
        net(torch.ones(2, 32, requires_grad=True)).sum().backward()

    return counted(NAMES.values(), passes)


@pytest.mark.parametrize("learn", [True, False])
def test_shares_are_gathered_there_and_back_and_their_gradients_summed(learn):
    size = 4 * 4 * 32 * 32
    calls = {call.kind: call for call in sharded(size, parts=4, forward=2, backward=1, learns=size * learn)}
    for seen in world(2, pass_through_shares, learn):
        for kind, name in NAMES.items():
            sizes = [whole for called, whole in seen if called == name]
            expected = calls.get(kind, Call(kind, 0, 0))
            ahead = len(sizes) - expected.times  # a backward pass may fetch one part ahead that nobody needs any more
            assert 0 <= ahead <= (kind == "all-gather") and set(sizes) <= {expected.size}, kind


def test_a_ring():
    """Three processes: parts of 100 bytes, two hops there, two more for a sum of all; 10 bytes a second, half a second late."""
    link = Link(latency=0.5, bandwidth=10.0)
    for kind, rounds in (("all-gather", 1), ("reduce-scatter", 1), ("all-reduce", 2)):
        call = Call(kind, 300, times=2)
        assert sent([call], 3) == pytest.approx(2 * rounds * 2 * 100)
        assert seconds([call, call], 3, link) == pytest.approx(2 * 2 * rounds * 2 * (0.5 + 10))
        assert sent([call], 1) == seconds([call], 1, link) == 0
