"""Processes that were started together know of each other, with a GPU or without."""

import time

import pytest
import torch
from processes import world

from stepdistill import assemble, distributed
from stepdistill.errors import UserError
from stepdistill.recipe import load_recipe


@pytest.mark.parametrize("accelerator", [True, False])
def test_accelerate_is_told_where_there_is_no_accelerator(monkeypatch, accelerator):
    asked = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)
    monkeypatch.setattr(distributed, "PartialState", lambda **how: asked.append(how))
    distributed.state()
    assert asked == [{"cpu": not accelerator}]


def talk():
    rank = distributed.rank()
    mean = distributed.mean(torch.tensor(float(rank))).item()
    flags = [distributed.anyone(flag) for flag in (rank == 1, False)]
    return rank, distributed.world(), mean, distributed.device().type, flags, distributed.told(f"from {rank}")


def test_two_processes_are_a_world():
    assert world(2, talk) == [(rank, 2, 0.5, "cpu", [True, False], "from 0") for rank in (0, 1)]


def test_one_process_agrees_with_itself():
    assert talk() == (0, 1, 0.0, distributed.device().type, [False, False], "from 0")


def ask_the_hub(folder):
    """What assembling finds of a model that the first process takes its time to fetch."""

    def load(*_):
        if distributed.rank() == 0:
            time.sleep(0.5)
            (folder / "model").touch()
        return (folder / "model").exists()

    def found(family, *_):
        raise UserError(str(family))

    assemble.load_family, assemble.check_guidance = load, found
    recipe = load_recipe("lcm_sd15", data=False, there=False)
    with pytest.raises(UserError, match="True"):
        assemble.assemble(recipe)


def test_the_first_process_asks_the_hub_before_the_others(tmp_path):
    world(2, ask_the_hub, tmp_path)


def fail():
    raise ValueError("on purpose") if distributed.rank() else SystemExit(3)


def test_a_test_hears_what_failed_in_a_process():
    with pytest.raises(AssertionError, match=r"ValueError: on purpose|SystemExit: 3"):
        world(2, fail)
