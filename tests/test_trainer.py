"""The loop: who moves, what is logged, resuming bit for bit, stopping before damage."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from processes import world
from students import student

from stepdistill import distributed
from stepdistill.data import build_batches
from stepdistill.errors import Diverged
from stepdistill.pairs import make_pairs
from stepdistill.show import Line
from stepdistill.strategies import LCM
from stepdistill.trainer import Trainer

QUICK = (
    *("data.count=12", "pairs={count: 12, steps: 2}", "train.batch=4", "train.steps=4"),
    *("optim.student_lr=1e-2", "optim.critic_lr=1e-2"),
)
STRATEGIES = {
    "lcm": "{name: lcm, guidance: [1, 3], ema: 0.9}",
    "dmd2": "{name: dmd2, student_every: 2, guidance: 2}",
    "f_distill": "{name: f_distill, student_every: 2, bins: 2, bins_decay: 0.5}",
    "vsd": "{name: vsd}",
    "phased_dmd": "{name: phased_dmd, steps: 2, phase_steps: 2, student_every: 1, guidance: 2}",
    "tscd": "{name: tscd, segments: [2, 1], stage_steps: 2, mix: [0.1, 0.2], grid: 4, guidance: [1, 3], ema: 0.9}",
    "dmd": "{name: dmd}",
    "scm": "{name: scm, guidance: 2}",
    "rcm": "{name: rcm, guidance: 2, warmup: 1, student_every: 2}",
}
# the loop is one: three strategies prove it every time, and test_one_step takes a step of each
ALWAYS = ["lcm", "dmd2", "phased_dmd"]
EVERY = [*ALWAYS, *(pytest.param(name, marks=pytest.mark.long) for name in STRATEGIES if name not in ALWAYS)]


def trainer(folder, *overrides, strategy="lcm", teacher="eps") -> Trainer:
    distillation = student(folder, teacher, *QUICK, *overrides, strategy=STRATEGIES[strategy])
    if "pairs" in distillation.strategy.needs:
        make_pairs(distillation, folder / "pairs", Line())
    return Trainer(distillation, build_batches(distillation.recipe, distillation.family, pairs=folder / "pairs"))


def weights(made: Trainer) -> dict[str, torch.Tensor]:
    return {name: x.detach().clone() for name, x in made.distillation.tensors().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether all of the first are in the second, bit for bit."""
    return all(torch.equal(x, other[name]) for name, x in one.items())


def base_weights(made: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in made.roles.teacher.net.named_parameters() if "lora_" not in name}


@pytest.mark.parametrize("strategy", EVERY)
@pytest.mark.parametrize("lora", ["{rank: 4}", "null"])
def test_the_teacher_stays_bit_identical_while_its_roles_move(tmp_path, strategy, lora):
    made = trainer(tmp_path, f"lora={lora}", strategy=strategy)
    base, before = base_weights(made), weights(made)
    for _ in range(3):
        made.step()
    assert same(base_weights(made), base)
    after = weights(made)
    for role in made.strategy.roles:
        changed = [not torch.equal(after[name], before[name]) for name in before if name.startswith(f"roles/{role}/")]
        assert any(changed), role


@pytest.mark.parametrize("teacher", ["v", "flow"])
@pytest.mark.parametrize("strategy", EVERY)
def test_checkpointing_changes_no_log_and_no_weight(tmp_path, strategy, teacher):
    plain, replayed = (
        trainer(tmp_path, f"train.checkpointing={on}", strategy=strategy, teacher=teacher) for on in ("false", "true")
    )
    for _ in range(3):
        assert plain.step() == replayed.step()
    assert same(weights(plain), weights(replayed))


@pytest.mark.parametrize("strategy", EVERY)
@pytest.mark.parametrize("lora", ["{rank: 4}", "null"])
def test_a_resumed_run_ends_with_the_weights_of_an_unbroken_one(tmp_path, strategy, lora):
    overrides = (f"lora={lora}", "train.ema=0.9", "optim.schedule=cosine", "optim.warmup=2")
    whole = trainer(tmp_path, *overrides, strategy=strategy)
    logs = [whole.step() for _ in range(4)]

    first = trainer(tmp_path, *overrides, strategy=strategy)
    for _ in range(2):
        first.step()
    path = first.save(tmp_path / "checkpoints")
    second = trainer(tmp_path, *overrides, strategy=strategy)
    second.load(path)
    assert [second.step() for _ in range(2)] == logs[2:]
    assert same(weights(whole), weights(second))


def test_a_run_with_moments_of_eight_bits_resumes_too(tmp_path):
    overrides = ("optim.optimizer=adamw8bit", "lora.rank=32")  # convolutions, kept in another order, among those it is for
    whole, first, second = (trainer(tmp_path, *overrides) for _ in range(3))
    logs = [whole.step() for _ in range(3)]
    first.step()
    second.load(first.save(tmp_path / "checkpoints"))
    assert [second.step() for _ in range(2)] == logs[1:]
    assert same(weights(whole), weights(second))
    assert any(x.dtype == torch.uint8 for _, x in second.moments())


def test_parts_of_a_batch_give_the_gradient_of_the_whole(tmp_path):
    """Adam hides the scale of a gradient, so the logged norm and loss are compared too."""
    whole, parts = (trainer(tmp_path, f"train.accumulate={n}") for n in (1, 4))
    for _ in range(2):
        one, four = whole.step(), parts.step()
        assert one.keys() == four.keys()
        for name, value in one.items():
            assert four[name] == pytest.approx(value, rel=2e-4), name


def test_only_who_got_a_loss_moves(tmp_path):
    made = trainer(tmp_path, "train.ema=0.5", strategy="dmd2")
    made.step()  # both
    before = weights(made)
    logs = made.step()  # the critic alone
    after = weights(made)
    assert not any(name.startswith("student/") for name in logs)
    for name, x in before.items():
        assert torch.equal(x, after[name]) == (not name.startswith("roles/fake/")), name


def test_gradients_of_every_player_are_clipped(tmp_path):
    """SGD in place of Adam, whose step would not show it."""
    made = trainer(tmp_path, "optim.clip=1e-3", strategy="dmd2")
    made.open(0)
    made.optimizers = {who: torch.optim.SGD(params, lr=1.0) for who, params in made.params.items()}
    made.rate = lambda who: 1.0
    before = weights(made)
    logs, after = made.step(), weights(made)
    for who, role in (("student", "student"), ("critic", "fake")):
        moved = [(after[name] - x).square().sum() for name, x in before.items() if name.startswith(f"roles/{role}/")]
        assert logs[f"{who}/grad_norm"] > 1e-3
        assert math.sqrt(sum(moved)) == pytest.approx(1e-3, rel=1e-2)


def test_learning_rates_warm_up_and_follow_the_cosine(tmp_path):
    made = trainer(tmp_path, "train.steps=8", "optim.warmup=2", "optim.schedule=cosine", "optim.student_lr=0.01")
    made.open(0)
    rates = []
    for made.at in range(8):
        rates.append(made.rate("student"))
    assert rates[0] == pytest.approx(0.005)
    assert rates[4] == pytest.approx(0.005)
    assert rates[7] == pytest.approx(0.01 * 0.5 * (1 + math.cos(math.pi * 7 / 8)))


def test_learning_rates_begin_and_end_with_each_stage(tmp_path, monkeypatch):
    made = trainer(tmp_path, "train.steps=12", "optim.schedule=cosine", "optim.student_lr=0.01")
    monkeypatch.setattr(made.strategy, "stage", lambda step: int(step >= 4), raising=False)
    rates = []
    for made.at in range(12):
        if made.strategy.stage(made.at) != made.stage:
            made.open(made.strategy.stage(made.at))
        rates.append(made.rate("student"))
    done = [k / 4 for k in range(4)] + [k / 8 for k in range(8)]
    assert rates == pytest.approx([0.005 * (1 + math.cos(math.pi * x)) for x in done])


def test_the_average_follows_the_student(tmp_path):
    made = trainer(tmp_path, "train.ema=0.99")
    made.roles["student_ema"].follow(made.roles.student)
    start = weights(made)
    made.step()
    after = weights(made)
    decay = min(0.99, 1 / 10)  # the shorter memory of step 0
    for name in made.roles.student.named_parameters():
        old, new = start[f"roles/student/{name}"], after[f"roles/student/{name}"]
        torch.testing.assert_close(after[f"roles/student_ema/{name}"], decay * old + (1 - decay) * new)


@pytest.fixture
def poison(monkeypatch):
    """Call it to let a player's loss be not finite, or finite with a slope that is not, from now on; "none": no more."""

    kinds: dict[type, Callable] = {}

    def put(made: Trainer, who: str, kind: str) -> None:
        strategy = type(made.strategy)
        honest = kinds.setdefault(strategy, strategy.losses)

        def losses(self, roles, batch, draw):
            for player, loss, logs in honest(self, roles, batch, draw):
                if player == who and kind == "loss":
                    loss = loss * math.nan
                elif player == who and kind == "gradient":
                    p = made.params[who][-1]
                    loss = loss + (p - p.detach()).abs().sum().sqrt()
                yield player, loss, logs

        monkeypatch.setattr(strategy, "losses", losses)

    return put


def everything(made: Trainer) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    return weights(made) | {name: x.clone() for name, x in made.moments()}


CRITICS = ("dmd2", "f_distill", "vsd", "phased_dmd", "tscd", "dmd", "rcm")
PLAYERS = [*((name, "student") for name in STRATEGIES), *((name, "critic") for name in CRITICS)]
OFTEN = [("lcm", "student"), ("dmd2", "critic"), ("f_distill", "student")]  # f_distill has averages besides weights


@pytest.mark.parametrize(
    ("strategy", "who"), [pytest.param(*one, marks=[] if one in OFTEN else pytest.mark.long) for one in PLAYERS]
)
def test_what_is_not_finite_moves_nobody_and_is_named(tmp_path, poison, strategy, who):
    made = trainer(tmp_path, "train.skip=2", "train.ema=0.9", "train.steps=8", strategy=strategy)
    made.step(), made.step()
    for kind in ("loss", "gradient"):
        made.skipped = None
        while made.skipped is None:  # a student may wait for its turn
            while made.strategy.stage(made.at) != made.stage:  # a stage changes weights as it begins
                poison(made, who, "none")
                made.step()
            poison(made, who, kind)
            before, at = everything(made), made.at
            values = made.step()
        player, tensor = made.skipped
        assert player == who and values == {}
        assert tensor == "the loss" if kind == "loss" else tensor.startswith("the gradient of ")
        assert made.at == at + 1 and same(before, everything(made))
    poison(made, who, "none")
    made.step()
    assert made.skipped is None and not same(before, everything(made))


def test_a_run_of_iterations_left_out_survives_resuming_and_ends_where_the_recipe_says(tmp_path, poison):
    first, second, third = (trainer(tmp_path, "train.skip=2", "optim.warmup=0") for _ in range(3))
    poison(first, "student", "loss")
    first.step()
    poison(first, "student", "none")
    first.step()  # a good one between them: the count begins again
    poison(first, "student", "gradient")
    first.step()
    second.load(first.save(tmp_path / "checkpoints"))
    poison(second, "student", "gradient")
    second.step()
    with pytest.raises(Diverged, match="lora_") as caught:
        second.step()
    assert (caught.value.player, caught.value.step, second.at) == ("student", 4, 4)
    assert same(weights(first), weights(second))
    third.load(second.save(tmp_path / "checkpoints"))
    poison(third, "student", "gradient")
    with pytest.raises(Diverged):  # the same iteration again ends as before
        third.step()


def test_a_finite_iteration_is_as_if_nobody_had_looked(tmp_path):
    one, other = trainer(tmp_path, strategy="f_distill"), trainer(tmp_path, "train.skip=3", strategy="f_distill")
    assert [one.step() for _ in range(2)] == [other.step() for _ in range(2)]
    assert same(everything(one), everything(other))


def poisoned_alone(folder):
    """One process alone has a loss that is not finite, and then a gradient."""
    torch.set_num_threads(1)
    made = trainer(folder / str(distributed.rank()), "train.skip=1", "data.count=4", "train.batch=2")
    honest = LCM.losses

    def losses(self, roles, batch, draw):
        for who, loss, logs in honest(self, roles, batch, draw):
            p = made.params["student"][-1]
            poisons = {1: loss * math.nan, 3: loss + (p - p.detach()).abs().sum().sqrt()}
            yield who, poisons.get(draw.step, loss) if distributed.rank() == 1 else loss, logs

    LCM.losses = losses
    told = []
    for _ in range(4):
        before = weights(made)
        values = made.step()
        told.append((made.skipped, values, same(before, weights(made))))
    return told


def test_what_is_not_finite_on_one_process_stops_none_of_them_alone(tmp_path):
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        student(tmp_path / str(rank))  # saves the model, which the first of several processes alone would do
    one, other = world(2, poisoned_alone, tmp_path)
    assert one[1] == (("student", "the loss"), {}, True)
    assert one[3][0][1].startswith("the gradient of roles/student/") and one[3][1:] == ({}, True)
    assert all(skipped is None and values and not stayed for skipped, values, stayed in one[::2])
    assert one == other  # what is logged is a mean over them, too


def test_yielding_inside_no_grad_is_refused(tmp_path, monkeypatch):
    made = trainer(tmp_path)

    def losses(self, roles, batch, draw):
        with torch.no_grad():
            yield "student", torch.zeros(()), {}

    monkeypatch.setattr(LCM, "losses", losses)
    with pytest.raises(RuntimeError, match="inside no_grad"):
        made.step()
    torch.set_grad_enabled(True)


def test_a_loss_that_reaches_nothing_is_refused(tmp_path, monkeypatch):
    made = trainer(tmp_path)
    stranger = torch.zeros((), requires_grad=True)
    monkeypatch.setattr(LCM, "losses", lambda self, roles, batch, draw: iter([("student", stranger * 1, {})]))
    with pytest.raises(RuntimeError, match="reaches none of its parameters"):
        made.step()


def test_same_seed_same_run_and_another_seed_another(tmp_path):
    one, same, other = (trainer(tmp_path, f"train.seed={seed}").step() for seed in (0, 0, 1))
    assert one == same
    assert one["student/consistency"] != other["student/consistency"]
