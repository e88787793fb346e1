"""Several processes do what one does with the whole batch, whoever holds which weights; and go on where others stopped."""

import numpy as np
import pytest
import several
import torch
from processes import world
from several import prepare, trainer, walked
from torch import nn

from stepdistill import distributed
from stepdistill.assemble import assemble
from stepdistill.data import build_batches
from stepdistill.errors import UserError
from stepdistill.recipe import load_recipe
from stepdistill.sharding import make_mesh
from stepdistill.trainer import Trainer

ALL = ("train.accumulate=2", "train.checkpointing=true", "train.ema=0.9")  # of what must go together
LORAS = ("lora.rank=4", "lora=null")
OWN = ("student/least_weight", "student/most_weight")  # logged values that are extremes and no means


def near(one, other):
    """Weights and logs of two walks agree to 1e-5."""
    (logs, weights), (theirs, others) = one, other
    assert np.abs(weights - others).max() < 1e-5
    for mine, yours in zip(logs, theirs, strict=True):
        assert mine.keys() == yours.keys()
        for name in mine.keys() - set(OWN):
            assert mine[name] == pytest.approx(yours[name], rel=1e-5, abs=1e-5), name


def compare(folder, strategy, steps, processes, *overrides, machines=1, teacher="eps", size=()):
    """Several processes beside one; returns how many tensors were in shares. size: overrides that the pipeline needs."""
    recipe, alone = prepare(folder, strategy, teacher, *size), [text for text in overrides if "shard" not in text]
    made = trainer(recipe, *alone)
    began = {name: x.detach().clone() for name, x in made.distillation.tensors().items()}
    logs = [made.step() for _ in range(steps)]
    weights = several.weights(made).numpy()
    for learner in (name for names in made.players.values() for name in names):  # each has learnt, ten times what may differ
        mine = [(x - began[name]).abs().max() for name, x in made.distillation.tensors().items() if f"/{learner}/" in name]
        assert max(mine) > 1e-4, learner
    theirs, others, shares, _ = walked(folder / "several", processes, recipe, steps, overrides, None, machines)
    near((logs, weights), (theirs, others))
    return shares


def test_two_processes_with_adapters_equal_one(tmp_path):
    assert compare(tmp_path, "lcm", 2, 2) == 0


def test_two_processes_with_copies_in_shares_equal_one(tmp_path):
    assert compare(tmp_path, "dmd2", 2, 2, "lora=null", "train.shard=full", *ALL) > 100


def small(recipe):
    """One step of adapters in 8 bits on a network in shares; what their weights add up to."""
    made = assemble(load_recipe(recipe, ["train.shard=full", "optim.optimizer=adamw8bit"]), shares=True)
    made = Trainer(made, build_batches(made.recipe, made.family))
    made.step()
    kinds = {type(optimizer).__name__ for optimizer in made.optimizers.values()}
    return distributed.in_shares(made.roles.student.net), kinds, several.weights(made).double().sum().item()


@pytest.mark.long
def test_adapters_in_8_bits_go_with_shares(tmp_path):
    one, other = world(2, small, prepare(tmp_path, "lcm"))
    assert one == other and one[:2] == (True, {"AdamW8bit"})


MATRIX = [
    *(
        (strategy, lora, shard)
        for strategy in several.STRATEGIES
        if strategy != "reflow"
        for lora in LORAS
        for shard in (None, "full")
    ),
    *(("lcm", "lora.rank=4", "hybrid"), ("dmd2", "lora=null", "hybrid"), ("tscd", "lora=null", "hybrid")),
]


@pytest.mark.long
@pytest.mark.parametrize(("strategy", "lora", "shard"), MATRIX)
def test_several_processes_equal_one(tmp_path, strategy, lora, shard):
    """Four processes on two machines where shares lie within each; two else. Phases and stages change on the way."""
    processes, machines = (4, 2) if shard == "hybrid" else (2, 1)
    steps = 3 if strategy in ("phased_dmd", "tscd") else 2
    more = ALL if strategy in ("dmd2", "f_distill", "tscd") else ()
    more = more[1:] if strategy == "f_distill" or shard == "hybrid" else more  # its ratios are of each part alone
    shares = compare(tmp_path, strategy, steps, processes, lora, f"train.shard={shard or 'null'}", *more, machines=machines)
    assert (shares > 0) == (lora == "lora=null" and shard is not None)


TRANSFORMERS = {
    "flow": (),
    "flux2": ("data.resolution=32", "strategy.guidance=1"),
    "wan": ("data.resolution=32", "data.frames=1", "train.batch=6"),
}


@pytest.mark.long
@pytest.mark.parametrize("teacher", TRANSFORMERS)
@pytest.mark.parametrize("lora", LORAS)
@pytest.mark.parametrize("shard", ["null", "full"])
def test_transformers_in_three_processes(tmp_path, teacher, lora, shard):
    """The two experts of Wan 2.2 too: a process has samples for one of them, and its neighbour for the other."""
    compare(
        *(tmp_path, "dmd2", 2, 3, lora, f"train.shard={shard}", "train.checkpointing=true"),
        **{"teacher": teacher, "size": TRANSFORMERS[teacher]},
    )


WALKS = {"one": (1, None), "two": (2, None), "two in shares": (2, "full"), "three in shares": (3, "full")}


@pytest.mark.long
@pytest.mark.parametrize(
    ("before", "after"),
    [("two", "one"), ("two", "two in shares"), ("two in shares", "two"), ("two in shares", "three in shares")],
)
def test_a_checkpoint_goes_on_in_any_number_of_processes(tmp_path, before, after):
    """dmd2 has moments of two players, and a head that is never in shares."""
    recipe, how = prepare(tmp_path, "dmd2"), ("lora=null", "train.ema=0.9")
    unbroken = walked(tmp_path / "unbroken", 1, recipe, 4, how)
    saved = None
    for part, (processes, shard) in enumerate((WALKS[before], WALKS[after])):
        args = (recipe, 2, (*how, f"train.shard={shard or 'null'}"), saved)
        logs, weights, _, saved = walked(tmp_path / str(part), processes, *args)
    near((logs, weights), (unbroken[0][2:], unbroken[1]))


def pieces():
    """Of a tensor that three processes share: what each holds, all of it, and the norm with one that each has."""
    from torch.distributed.fsdp import fully_shard

    net = nn.Linear(3, 4, bias=False)  # 4 rows among 3: one holds none
    nn.init.zeros_(net.weight)
    fully_shard(net, mesh=make_mesh("full"))
    values = torch.arange(12.0).reshape(4, 3)
    distributed.fill(net.weight, values)
    same = torch.equal(distributed.whole(net.weight), values)
    norm = distributed.norm([net.weight, torch.full((2,), 3.0)]).item()
    net.weight.grad = net.weight.detach() * 1
    distributed.clip([net.weight], norm, norm / 2)
    return len(distributed.local(net.weight)), same, norm, distributed.whole(net.weight.grad).sum().item()


def test_shares_are_filled_gathered_measured_and_clipped():
    made = world(3, pieces)
    assert sorted(rows for rows, *_ in made) == [0, 2, 2]
    assert all(same for _, same, *_ in made)
    assert [norm for *_, norm, _ in made] == pytest.approx([(506 + 18) ** 0.5] * 3)
    assert [total for *_, total in made] == pytest.approx([33] * 3)


def uneven():
    import os

    os.environ["LOCAL_WORLD_SIZE"] = "2"
    with pytest.raises(UserError, match="this one has 2 of 3"):
        make_mesh("hybrid")


def test_machines_of_different_size_cannot_be_hybrid():
    world(3, uneven)
