"""What a machine lacks is refused before any work, with the key, its value and what to do."""

from __future__ import annotations

import dataclasses

import pipelines
import pytest
import torch
import torch.nn.functional as F
from students import student

from stepdistill import distributed, extras, machine
from stepdistill.errors import UserError
from stepdistill.families import SD, SD3, Flux
from stepdistill.families import kernels as attention_kernels
from stepdistill.families.kernels import use_xformers
from stepdistill.machine import check_machine, lacks
from stepdistill.recipe import load_recipe
from stepdistill.runs import train


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return student(tmp_path_factory.mktemp("machine")).recipe


def changed(recipe, section, **keys):
    return dataclasses.replace(recipe, **{section: dataclasses.replace(getattr(recipe, section), **keys)})


def test_a_machine_that_has_everything_says_nothing(recipe):
    check_machine(recipe)
    check_machine(changed(recipe, "train", precision="bf16"))


def test_missing_packages_are_told_with_their_extras(recipe, monkeypatch):
    monkeypatch.setattr(extras, "installed", lambda _name: False)
    for section, keys, told in [
        (
            "optim",
            {"optimizer": "adamw8bit"},
            r"adamw8bit needs the package bitsandbytes.*pip install 'stepdistill\[quantize\]'",
        ),
        ("train", {"attention": "xformers"}, r"xformers needs the package xformers.*pip install 'stepdistill\[xformers\]'"),
    ]:
        with pytest.raises(UserError, match=told):
            check_machine(changed(recipe, section, **keys))


def test_compiling_needs_a_compiler(recipe, monkeypatch):
    monkeypatch.setattr(machine.shutil, "which", lambda _name: None)
    with pytest.raises(UserError, match=r"train.compile true needs a C\+\+ compiler.*set it to false"):
        check_machine(changed(recipe, "train", compile=True))
    check_machine(recipe)


@pytest.mark.parametrize(
    ("section", "keys", "told"),
    [
        ("model", {"dtype": "bfloat16"}, "model.dtype bfloat16: cpu .* does not compute in it; set model.dtype to float32"),
        ("train", {"precision": "bf16"}, "train.precision bfloat16: cpu .* set train.precision to no"),
    ],
)
def test_a_type_that_the_device_cannot_convolve_in(recipe, monkeypatch, section, keys, told):
    convolve = F.conv2d

    def conv2d(x, *args):
        if x.dtype != torch.float32:
            raise RuntimeError('"slow_conv2d_cpu" not implemented')
        return convolve(x, *args)

    assert not lacks(torch.device("cpu"), torch.float32)
    monkeypatch.setattr(F, "conv2d", conv2d)
    with pytest.raises(UserError, match=told):
        check_machine(changed(recipe, section, **keys))
    check_machine(recipe)


def test_a_batch_is_divided_among_processes_and_parts(recipe, monkeypatch):
    monkeypatch.setattr(distributed, "world", lambda: 3)
    for batch, parts, told in [
        (8, 1, "3 processes and train.accumulate 1; .* multiple of 3, as 9"),
        (9, 3, "9, as 9"),
        (12, 4, "12, as 12"),
    ]:
        made = changed(recipe, "train", batch=batch, accumulate=parts)
        if batch % (3 * parts):
            with pytest.raises(UserError, match=f"train.batch {batch} cannot be divided among {told}"):
                check_machine(made)
        else:
            check_machine(made)


def test_one_process_where_several_were_asked_for_is_refused(recipe, monkeypatch):
    asked = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}  # as accelerate 1.15 has it
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UserError, match=r"asked for several processes and started one.*--multi_gpu.*or take torchrun"):
        check_machine(recipe)
    for fine in (asked | {"WORLD_SIZE": "2"}, {"MASTER_ADDR": "127.0.0.1"}, {"ACCELERATE_MIXED_PRECISION": "no"}):
        machine.check_launch(fine)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["train.compile=true"], "train.shard: full does not go with train.compile true, .*; choose one"),
        (
            ["lora=null", "optim.optimizer=adamw8bit"],
            "train.shard: full, but adamw8bit cannot keep .* set optim.optimizer to adamw",
        ),
        (["model.quantize=int8"], "train.shard: full, but int8 layers cannot be shared out; set it to null, or model.quantize"),
    ],
)
def test_what_does_not_go_with_shares(recipe, overrides, told):
    file = recipe.model.source.replace("model-eps", "run/recipe.yaml")
    with pytest.raises(UserError, match=told):
        load_recipe(file, ["train.shard=full", *overrides])
    load_recipe(file, overrides)


def test_emulated_bfloat16_of_an_older_gpu_counts_as_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert lacks(torch.device("cuda"), torch.bfloat16)


def test_a_run_is_refused_before_its_folder_is_made(recipe, monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "lacks", lambda _device, dtype: True)
    with pytest.raises(UserError, match=r"model.dtype float32"):
        train(recipe, tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("kind", "made", "whole"), [(Flux, pipelines.flux, True), (SD3, pipelines.sd3, False)])
def test_xformers_takes_all_attention_or_is_refused(monkeypatch, kind, made, whole):
    """As on a GPU with the package: of diffusers' own dispatch, what it checks of them is left out."""
    family = kind(made())
    monkeypatch.setattr(attention_kernels, "require", lambda _package, _key: None)
    with pytest.raises(UserError, match="needs an NVIDIA GPU, and this is a cpu; set it to null"):
        use_xformers(family)
    monkeypatch.setattr(type(family.net), "device", torch.device("cuda"))
    asks = [m for m in family.net.modules() if hasattr(getattr(m, "processor", None), "_attention_backend")]

    def dispatch(*_args):
        for module in asks:
            module.processor = type(module.processor)()
            module.processor._attention_backend = "xformers"

    monkeypatch.setattr(type(family.net), "set_attention_backend", dispatch)
    monkeypatch.setattr(type(family.net), "enable_xformers_memory_efficient_attention", dispatch)
    if whole:
        use_xformers(family)
        assert len(asks) == 4
    else:
        with pytest.raises(UserError, match=r"SD3Transformer2DModel .* cannot replace \(CountedAttention\); set it to null"):
            use_xformers(family)


def test_xformers_is_refused_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(extras, "installed", lambda _name: False)
    with pytest.raises(UserError, match=r"needs the package xformers.*'stepdistill\[xformers\]'"):
        use_xformers(SD(pipelines.sd()))


def test_the_keys_are_checked(recipe):
    with pytest.raises(UserError, match=r"train.attention: flash must be"):
        load_recipe(recipe.model.source.replace("model-eps", "run/recipe.yaml"), ["train.attention=flash"])
