"""Parts of a pipeline are on the device while they are needed, and only then; nothing moves on a machine without one."""

from __future__ import annotations

import pipelines
import pytest
import torch
from students import student
from torch import nn

from stepdistill import devices, runs
from stepdistill.devices import placed, tiled
from stepdistill.families import FAMILIES, SD, SD3, Wan
from stepdistill.recipe import load_recipe
from stepdistill.runs import train
from stepdistill.strategies import DMD, LCM, Reflow
from stepdistill.trainer import Trainer

META, CPU = torch.device("meta"), torch.device("cpu")


class Part(nn.Linear):
    """Remembers where it was told to go."""

    def __init__(self):
        super().__init__(1, 1)
        self.told = []

    def to(self, device):
        self.told.append(device)
        return self.to_empty(device=device)


def test_parts_come_and_go_back():
    here, there = Part(), Part().to_empty(device=META)
    with placed([here, there], META):
        assert devices.place(here) == META and here.told == [META] and there.told == []
    assert here.told == [META, CPU] and there.told == []
    with pytest.raises(KeyError), placed([part := Part()], META):
        raise KeyError
    assert part.told == [META, CPU]


@pytest.mark.parametrize(
    ("family", "pipe", "count"), [(SD, pipelines.sd, 1), (SD3, pipelines.sd3, 2), (Wan, lambda: pipelines.wan(0.875), 1)]
)
def test_encoders_are_neither_networks_nor_the_autoencoder(family, pipe, count):
    made = family(pipe())
    found = made.encoders
    assert len(found) == count and all(type(part).__module__.startswith("transformers") for part in found)


@pytest.fixture
def moves(monkeypatch):
    """As if the CPU were a device, and `meta` the memory where parts wait: where each part lies, by its id."""
    where = {}
    monkeypatch.setattr(devices, "IDLE", META)
    monkeypatch.setattr(devices, "place", lambda module: where.get(id(module), CPU))
    monkeypatch.setattr(devices, "move", lambda module, device: where.update({id(module): device}))
    return where


def test_training_has_the_network_alone_on_the_device(tmp_path, monkeypatch, moves):
    student(tmp_path)
    quick = ("data.count=4", "train.batch=2", "train.steps=1", "eval.every=1", "eval.n=0", "eval.watch=0", "eval.steps=[1]")
    seen = []

    def watched(name, function, parts):
        def call(family_or_trainer, *args, **kw):
            family = getattr(family_or_trainer, "distillation", family_or_trainer)
            family = getattr(family, "family", family)
            seen.append((name, {devices.place(part) for part in parts(family)}))
            return function(family_or_trainer, *args, **kw)

        return call

    monkeypatch.setattr(SD, "encode_prompts", watched("text", SD.encode_prompts, lambda family: family.encoders))
    monkeypatch.setattr(SD, "encode", watched("encode", SD.encode, lambda family: [family.pipe.vae]))
    monkeypatch.setattr(SD, "decode", watched("decode", SD.decode, lambda family: [family.pipe.vae]))
    both = watched("step", Trainer.step, lambda family: [*family.encoders, family.pipe.vae])
    monkeypatch.setattr(Trainer, "step", both)
    monkeypatch.setattr(runs, "write_export", lambda _distillation, _folder: "not written")
    train(load_recipe(tmp_path / "run" / "recipe.yaml", quick), tmp_path / "out")
    assert {name for name, _ in seen} == {"text", "encode", "decode", "step"}
    assert all(places == ({META} if name == "step" else {CPU}) for name, places in seen)
    assert set(moves.values()) == {CPU}  # all back


def test_without_a_device_nothing_moves(tmp_path, monkeypatch):
    made = student(tmp_path)
    monkeypatch.setattr(devices, "move", None)
    with placed(runs.idle(made), devices.IDLE):
        pass


def test_a_strategy_that_looks_at_pixels_keeps_the_autoencoder(tmp_path):
    made = student(tmp_path)
    vae = made.family.pipe.vae
    assert not made.strategy.decodes and any(part is vae for part in runs.idle(made))
    made.strategy.decodes = True
    assert not any(part is vae for part in runs.idle(made)) and len(runs.idle(made)) == 1
    assert [LCM().decodes, DMD().decodes, DMD(distance="lpips").decodes] == [False, False, True]
    assert [Reflow().decodes, Reflow(distance="lpips_huber").decodes] == [False, True]


def test_large_pictures_are_decoded_in_tiles():
    """Of 16 pixels each, as it was made for: 48 are four times the memory, or less; a picture of one tile stays whole."""
    family = FAMILIES["StableDiffusionPipeline"](pipelines.sd())
    vae, sizes = family.pipe.vae, []
    vae.decoder.register_forward_pre_hook(lambda _module, args: sizes.append(tuple(args[0].shape)))
    for side in (8, 24):
        z = torch.randn(2, 4, side, side, generator=torch.Generator().manual_seed(0))
        whole = family.decode(z)
        sizes.clear()
        with tiled(vae, (16, 2 * side)):
            drawn = family.decode(z)
        assert drawn.shape == whole.shape and not vae.use_tiling and not vae.use_slicing
        if side == 8:
            assert torch.equal(drawn, whole) and sizes == [(2, 4, 8, 8)]
        else:
            assert len(sizes) > 2 and max(size[2] for size in sizes) == 8 and {size[0] for size in sizes} == {1}
            assert (drawn - whole).norm() < whole.norm()
