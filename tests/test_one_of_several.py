"""What one of several processes does, where the test plays the others.

Apart from `test_distributed` and `test_sharding`, because `mutations.py` runs tests in forks, where no server of processes is
reached.
"""

from dataclasses import replace

import pytest
import torch
from pipelines import sd, sd3, wan
from several import prepare, trainer
from students import student
from torch import nn

from stepdistill import distributed
from stepdistill.evaluate import grid
from stepdistill.families.load import family_of
from stepdistill.pairs import make_pairs
from stepdistill.sharding import parts, unsharded
from stepdistill.show import Line


def test_gradients_are_means_over_processes_also_where_some_have_none(monkeypatch):
    """As if another process had gradients of the second and third parameter."""
    told = []

    def all_reduce(flat):
        told.append(flat.tolist())
        flat += torch.tensor([0.0, 0, 5, 7, 0, 0, 1, 1, 0])

    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr(distributed.dist, "all_reduce", all_reduce)
    params = [nn.Parameter(torch.zeros(n)) for n in (2, 1, 1, 1)]
    params[0].grad, params[1].grad = torch.tensor([2.0, 4.0]), torch.tensor([1.0])
    distributed.mean_gradients(params)
    assert told == [[2, 4, 1, 0, 0, 1, 1, 0, 0]]  # in one message, with who has any
    assert [p.grad if p.grad is None else p.grad.tolist() for p in params] == [[1, 2], [3], [3.5], None]


def test_one_process_holds_everything(tmp_path):
    made = trainer(prepare(tmp_path, "lcm"), "lora=null", "train.shard=full")
    assert not made.distillation.together and not any(map(distributed.sharded, made.distillation.tensors().values()))


def test_what_is_shared_out_is_most_of_a_network_and_never_around_what_is_read():
    for pipe, least in ((sd("epsilon"), 0.6), (sd3(), 0.7), (wan(boundary_ratio=0.875), 0.4)):
        family = family_of(pipe)
        found = parts(family.net, family.feature_block(family.net))
        assert len(found) == len(set(found))
        held = {p for part in found for p in part.parameters()}
        whole = sum(p.numel() for p in family.net.parameters())
        assert sum(p.numel() for p in held) > least * whole
        for k, part in enumerate(found):  # inner ones first
            assert not any(module in found[:k] and part in module.modules() for module in found[:k])
            assert family.feature_block(family.net) not in list(part.modules())[1:]


WHOLE = {
    "guidance": ("eps", "{name: lcm, embed_guidance: 2}", ()),
    "experts": ("wan", "{name: dmd2}", ("data.resolution=32", "data.frames=5")),
}


@pytest.mark.parametrize("case", WHOLE)
def test_a_network_is_made_whole_as_it_is(tmp_path, case):
    """Also one that was given an input, and two in one."""
    teacher, strategy, overrides = WHOLE[case]
    net = student(tmp_path, teacher, "lora=null", *overrides, strategy=strategy).roles.student.net
    there, made = net.state_dict(), unsharded(net).state_dict()
    assert made.keys() == there.keys() and all(torch.equal(x, there[name]) for name, x in made.items())
    assert not any(x.data_ptr() == there[name].data_ptr() for name, x in made.items())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_grid_is_drawn_by_all_before_the_first_one_writes(tmp_path, monkeypatch, rank):
    (tmp_path / "samples").mkdir()
    said, made = [], student(tmp_path, "eps", "eval.steps=[4,1]")
    samples = grid.Samples(made, tmp_path / "samples", Line())
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(grid.Samples, "keep", lambda _self, shelf, row, *_: said.append(f"{shelf} {row}"))
    honest = grid.Samples.pictures
    monkeypatch.setattr(grid.Samples, "pictures", lambda self, walk: said.append("drawn") or honest(self, walk))
    monkeypatch.setattr(grid.Samples, "warn_if_inert", lambda _self, step: said.append("compared"))
    samples(3)
    rows = ["teacher teacher-25steps", "teacher teacher-4steps", "000003 student-4steps", "teacher teacher-1steps"]
    assert said == ["drawn"] * 5 + ["compared"] + [*rows, "000003 student-1steps"] * (rank == 0)
    assert (tmp_path / "samples" / "000003.png").is_file() == (rank == 0)


@pytest.mark.parametrize(("rank", "together", "mine"), [(0, True, 4), (1, True, 0), (0, False, 2), (1, False, 2)])
def test_pairs_are_written_once(tmp_path, monkeypatch, rank, together, mine):
    """Processes that work together make all of them, and the first one writes; others share them out."""
    quick = ("data.images=null", "pairs={count: 4, shard: 1, steps: 1}")
    made = replace(student(tmp_path, "eps", *quick, strategy="{name: reflow, steps: 1}"), together=together)
    for name, value in {"rank": rank, "world": 2}.items():
        monkeypatch.setattr(distributed, name, lambda value=value: value)
    monkeypatch.setattr(distributed, "wait", lambda: None)
    monkeypatch.setattr(distributed, "at_first", lambda action: action())
    make_pairs(made, tmp_path / "pairs", Line())
    assert len(list((tmp_path / "pairs").glob("*.safetensors"))) == mine
