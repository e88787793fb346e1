"""A step that fails: what is saved, and what is said; memory that runs out in every phase, and data that vanishes."""

from __future__ import annotations

import errno
import io
import resource
import weakref
from pathlib import Path

import pytest
import torch
from processes import start
from students import student

from stepdistill import checkpoint, memory_advice
from stepdistill.cli import main
from stepdistill.data import build_batches, cache
from stepdistill.errors import Diverged, Exploded, UserError
from stepdistill.memory_advice import memory, ran_out, remedies
from stepdistill.rescue import rescuing
from stepdistill.show import Line
from stepdistill.strategies import FDistill
from stepdistill.trainer import Trainer

QUICK = ("data.count=4", "train.batch=2", "train.steps=4", "eval={every: 0, n: 0}")
CPU = "[enforce fail at alloc_cpu.cpp:115] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."
ERRORS = {
    "gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 23 GiB."),
    "cpu": RuntimeError(CPU),
    "python": MemoryError(),
    "system": OSError(errno.ENOMEM, "Cannot allocate memory"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_memory_that_ran_out_is_known_by_all_its_names(name):
    assert ran_out(ERRORS[name])


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), OSError(errno.ENOENT, "no file"), ValueError(CPU)])
def test_other_errors_stay_what_they_are(error):
    assert not ran_out(error)
    with pytest.raises(type(error)) as caught, memory("training", None):
        raise error
    assert caught.value is error


@pytest.fixture
def recipe(tmp_path):
    return student(tmp_path, "eps", *QUICK).recipe


OPTIONS = {
    "train.checkpointing=true": 3_000_000,
    "train.accumulate=2": 2_500_000,
    "eval.batch=1": 1_234_000_000,
    "model.dtype=bfloat16": 10,
    "optim.optimizer=adamw8bit": 2_000_000,
    "model.quantize=nf4": 0,
    "lora.rank=16": 1_000_000,
}


@pytest.mark.parametrize(
    ("phase", "told"),
    [
        (
            "training",
            "train.checkpointing=true (3.0 MB), train.accumulate=2 (2.5 MB), model.dtype=bfloat16 (0.1 MB), "
            "optim.optimizer=adamw8bit (2.0 MB), lora.rank=16 (1.0 MB), ",
        ),
        ("sampling", "eval.batch=1 (1.23 GB), model.dtype=bfloat16 (0.1 MB), "),
        ("evaluation", "eval.batch=1 (1.23 GB), model.dtype=bfloat16 (0.1 MB), "),
        ("encoding", "model.dtype=bfloat16 (0.1 MB), "),
        ("making pairs", "pairs.batch=1, model.dtype=bfloat16 (0.1 MB), "),
    ],
)
def test_each_phase_has_its_remedies_in_order_with_their_gains(recipe, monkeypatch, phase, told):
    monkeypatch.setattr(memory_advice, "options", lambda _recipe: list(OPTIONS.items()))
    what = remedies(phase, recipe).partition("estimate: ")[2]
    assert what.startswith(told) and what.removeprefix(told) == "a smaller data.resolution"


def test_gains_are_those_of_the_plan_and_without_one_there_is_still_advice(recipe, monkeypatch):
    gains = dict(memory_advice.options(recipe))
    assert gains["train.accumulate=2"] > 0 and "train.accumulate=2 (" in remedies("training", recipe)

    def nothing(_recipe):
        raise MemoryError

    monkeypatch.setattr(memory_advice, "make_plan", nothing)
    assert "data.resolution" in remedies("training", recipe)


def test_what_filled_the_memory_is_let_go_before_anything_else_is_done(recipe, monkeypatch):
    held = []
    monkeypatch.setattr(memory_advice, "remedies", lambda *_: f"{held[0]() is None}")

    def fill():
        large = torch.zeros(1000)
        held.append(weakref.ref(large))
        raise MemoryError

    with pytest.raises(UserError, match=r"out of memory in sampling \(MemoryError\)\. True"), memory("sampling", recipe):
        fill()


def trainer(folder, *overrides, strategy="{name: lcm}") -> Trainer:
    made = student(folder, "eps", *QUICK, *overrides, strategy=strategy)
    return Trainer(made, build_batches(made.recipe, made.family))


def tensors(made: Trainer) -> dict[str, torch.Tensor]:
    return {name: x.detach().clone() for name, x in (made.distillation.tensors() | dict(made.moments())).items()}


def failing(honest, error):
    """The losses of a strategy, and then an error: statistics have changed, gradients are there."""

    def losses(self, roles, batch, draw):
        yield from honest(self, roles, batch, draw)
        raise error

    return losses


def test_out_of_memory_in_backward_saves_the_state_before_the_step(tmp_path, monkeypatch):
    made = trainer(tmp_path, strategy="{name: f_distill, bins: 2, student_every: 1}")
    made.step()
    before = tensors(made)
    monkeypatch.setattr(memory_advice, "options", lambda _recipe: list(OPTIONS.items()))  # a plan, too, asks for losses
    monkeypatch.setattr(FDistill, "losses", failing(FDistill.losses, ERRORS["gpu"]))
    with (
        pytest.raises(
            UserError, match=r"out of memory in training \(CUDA out of memory\)\. .*step 1 is saved: .*/000001"
        ) as caught,
        rescuing(made, tmp_path / "checkpoints", Line()),
    ):
        made.step()
    saved, meta = checkpoint.load(checkpoint.newest(tmp_path / "checkpoints"))
    assert meta["step"] == 1 and saved.keys() == before.keys()
    assert all(torch.equal(x, saved[name]) for name, x in before.items())
    assert "train.checkpointing=true" in str(caught.value)


def test_out_of_memory_as_weights_move_saves_nothing(tmp_path, monkeypatch):
    made = trainer(tmp_path)
    folder = tmp_path / "checkpoints"
    made.step()
    kept = made.save(folder)
    made.step()

    def step(*_):
        raise ERRORS["gpu"]

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(UserError, match=f"The last checkpoint is {kept}"), rescuing(made, folder, Line()):
        made.step()
    assert checkpoint.steps(folder) == [1]


def test_divergence_is_saved_and_an_explosion_names_what_is_from_before_it(tmp_path):
    made = trainer(tmp_path)
    folder = tmp_path / "checkpoints"
    with pytest.raises(Diverged, match="000000"), rescuing(made, folder, Line()):
        raise Diverged("student", "the loss", 0)
    for made.at in (5, 10, 15):
        made.save(folder)
    with pytest.raises(Exploded) as caught, rescuing(made, folder, Line()):
        raise Exploded("critic", 1.0, 5000.0, 20)
    assert checkpoint.steps(folder) == [10, 15] and caught.value.checkpoints == (folder / "000010",)
    assert f"{folder}/000010" in str(caught.value) and "000015" not in str(caught.value) and "critic_lr" in str(caught.value)


def test_an_encoding_that_vanishes_is_named_saved_before_and_encoded_again(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "opened", cache.opened.__wrapped__)  # or a file would stay open for a while
    made = student(tmp_path, "eps", *QUICK)
    where = tmp_path / "cache"
    first = Trainer(made, build_batches(made.recipe, made.family, cache=where))
    first.step()
    before = tensors(first)
    gone = sorted(where.rglob("pictures-*/*.safetensors"))[0]
    gone.unlink()
    with (
        pytest.raises(UserError, match="has vanished or was changed") as caught,
        rescuing(first, tmp_path / "checkpoints", Line()),
    ):
        first.step()
    assert str(gone) in str(caught.value) and "step 1 is saved" in str(caught.value)
    again = Trainer(made, build_batches(made.recipe, made.family, cache=where))
    again.load(checkpoint.newest(tmp_path / "checkpoints"))
    assert all(torch.equal(x, before[name]) for name, x in tensors(again).items())
    again.step()
    changed = sorted(where.rglob("texts-*/*.safetensors"))[0]
    changed.write_bytes(b"something else")
    with pytest.raises(UserError, match=str(changed)):
        again.step()
    said = io.StringIO()
    third = Trainer(made, build_batches(made.recipe, made.family, Line(said), cache=where))
    third.step()
    assert f"{changed} was damaged" in said.getvalue()


PHASES = {
    "encoding": "stepdistill.runs.build_batches",
    "sampling": "stepdistill.evaluate.grid.Samples.pictures",
    "evaluation": "stepdistill.runs.evaluate",
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_run_says_in_which_phase_memory_ran_out_and_leaves_with_2(tmp_path, monkeypatch, capsys, phase):
    student(tmp_path)

    def full(*_args, **_more):
        raise ERRORS["cpu"]

    monkeypatch.setattr(PHASES[phase], full)
    monkeypatch.setattr(memory_advice, "options", lambda _recipe: [("eval.batch=1", 10**9), ("model.dtype=bfloat16", 10**8)])
    quick = ("data.count=2", "train.batch=1", "train.steps=1", "eval={every: 1, n: 8, watch: 0, steps: [1]}")
    assert main(["train", str(tmp_path / "run" / "recipe.yaml"), *quick, "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"out of memory in {phase} ([enforce fail at alloc_cpu" in said and "model.dtype=bfloat16 (100.0 MB)" in said
    assert "Traceback" not in said


def starve(folder):
    """A training that is given a batch, but no memory for it."""
    made = trainer(folder, "train.batch=2")
    made.step()
    honest = made.data

    def large(step, part):
        batch, index = honest(step, part)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, resource.RLIM_INFINITY))
        return batch._replace(noise=torch.ones(2**28)), index

    made.data = large
    large.device = honest.device
    try:
        with rescuing(made, folder / "checkpoints", Line()):
            made.step()
    except UserError as error:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        (folder / "said").write_text(str(error))


def test_memory_that_really_runs_out_is_told_and_the_state_saved(tmp_path):
    process = start(starve, tmp_path)
    process.join(60)
    assert process.exitcode == 0
    assert "out of memory in training" in (tmp_path / "said").read_text()
    assert checkpoint.steps(tmp_path / "checkpoints") == [1]
