"""Bases in 8 and 4 bits: exact to differentiate, untouched by training, and the same in a stock pipeline."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from students import PROMPTS, noise, student
from torch import nn
from torchao.utils import TorchAOBaseTensor

from stepdistill import extras
from stepdistill.assemble import assemble
from stepdistill.attention import jvp
from stepdistill.card import snippet
from stepdistill.data import build_batches
from stepdistill.errors import UserError
from stepdistill.export import stock_latents, trainers_latents, write_export
from stepdistill.families.load import load_pipeline_folder
from stepdistill.families.quantize import keep_gradients, without_gpu
from stepdistill.recipe import load_recipe
from stepdistill.roles import enable_checkpointing
from stepdistill.serve import open_export
from stepdistill.sidecar import read_export
from stepdistill.trainer import Trainer

KINDS = ("int8", "nf4")
DMD2 = "{name: dmd2, guidance: 1, student_every: 1, steps: 1}"
QUICK = ("data.resolution=16", "data.count=4", "train.batch=2", "optim.student_lr=1e-2", "optim.critic_lr=1e-2")


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory):
    """A distillation of FLUX over a quantized base."""
    return student(tmp_path_factory.mktemp(request.param), "flux", *QUICK, f"model.quantize={request.param}", strategy=DMD2)


def layers(net: nn.Module) -> dict[str, nn.Module]:
    """The frozen linear layers of a network, also those below adapters."""
    return {name: m for name, m in net.named_modules() if isinstance(m, nn.Linear) and "lora_" not in name}


def plain(layer: nn.Module) -> torch.Tensor:
    """The weight by which a quantized layer multiplies, [out, in]."""
    if isinstance(layer.weight, TorchAOBaseTensor):
        return layer.weight.dequantize()
    import bitsandbytes.functional as F

    return F.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def inputs(family):
    """x_t, t, cond of two samples."""
    x = torch.randn(2, *family.shape, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0.3, 0.8]), family.encode_prompts(PROMPTS)


def test_every_linear_layer_is_quantized_and_nothing_else(made):
    family, kind = made.family, made.recipe.model.quantize
    assert len(layers(family.net)) == 50
    for layer in layers(family.net).values():
        full = (layer.weight.qdata if kind == "int8" else layer.weight.data).nbytes
        assert full == layer.in_features * layer.out_features // {"int8": 1, "nf4": 2}[kind]
        assert plain(layer).dtype == torch.float32
    for part in (family.pipe.vae, family.pipe.text_encoder, family.pipe.text_encoder_2):
        assert {type(p) for p in part.parameters()} == {nn.Parameter}


def test_a_quantized_layer_is_the_one_of_its_own_weights(made):
    """Forward and backward, in float32: rounding is in the weights alone, and its gradient goes through the same ones."""
    for layer in list(layers(made.family.net).values())[::10]:
        x = torch.randn(3, 5, layer.in_features, requires_grad=True)
        up = torch.randn(3, 5, layer.out_features)
        got, want = layer(x), nn.functional.linear(x, plain(layer), layer.bias)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        (a,), (b,) = (torch.autograd.grad(y, x, up) for y in (got, want))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_forward_derivatives_go_through_it(made):
    """As scm and rcm take them."""
    family = made.family
    x, t, cond = inputs(family)
    v, h = torch.randn_like(x), 1e-2

    def f(x):
        return family.forward(family.net, x, t, cond)

    _, slope = jvp(f, (x,), (v,))
    with torch.no_grad():
        differences = (f(x + h * v) - f(x - h * v)) / (2 * h)
    assert (slope - differences).norm() < 1e-2 * differences.norm()


def test_dmd2_trains_over_a_quantized_base(made):
    x, t, cond = inputs(made.family)
    teacher, before = made.roles.teacher(x, t, cond).x0, {name: p.clone() for name, p in made.tensors().items()}
    base = {name: plain(layer) for name, layer in layers(made.family.net).items()}
    trainer = Trainer(made, build_batches(made.recipe, made.family))
    for _ in range(2):
        trainer.step()
    assert torch.equal(made.roles.teacher(x, t, cond).x0, teacher)
    assert all(torch.equal(plain(layer), base[name]) for name, layer in layers(made.family.net).items())
    moved = {name.split("/")[1] for name, p in made.tensors().items() if not torch.equal(p, before[name])}
    assert moved == {"student", "fake"}
    learning = {name for name, p in made.family.net.named_parameters() if p.requires_grad}
    assert learning and all("lora_" in name for name in learning)


def test_checkpointing_over_a_quantized_base_changes_no_gradient(made):
    x, t, cond = inputs(made.family)
    params = [p.requires_grad_() for p in made.roles.student.parameters()]

    def gradients():
        return torch.autograd.grad(made.roles.student(x, t, cond).x0.square().mean(), params)

    plainly = gradients()
    enable_checkpointing(made.family.net)
    try:
        assert all(torch.equal(a, b) for a, b in zip(plainly, gradients(), strict=True))
    finally:
        made.family.net.disable_gradient_checkpointing()


def test_the_export_gives_the_trainers_samples_in_a_pipeline_quantized_as_the_card_says(made, tmp_path, monkeypatch):
    told_of_checks = write_export(made, tmp_path / "export", ("diffusers",))
    assert "in stock diffusers" in told_of_checks
    told = read_export(tmp_path / "export")
    assert told.quantize == made.recipe.model.quantize
    ours = made.family.packed(trainers_latents(made, told, noise(made)))
    monkeypatch.chdir(tmp_path / "export")
    lines = snippet(told).split("image = pipe(")[0]
    scope: dict = {}
    with without_gpu():  # plain diffusers has nf4 on GPUs alone
        exec(lines, scope)
    keep_gradients(getattr(scope["pipe"], told.network))  # else some CPUs pack weights, which fails for layers this narrow
    theirs = stock_latents(scope["pipe"], told, made.family.packed(noise(made)))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)


def test_the_lora_loads_on_the_base_as_it_is_too(made, tmp_path):
    write_export(made, tmp_path / "export", ("diffusers",))
    told = read_export(tmp_path / "export")
    over = assemble(dataclasses.replace(made.recipe, model=dataclasses.replace(made.recipe.model, quantize=None)))
    over.load(made.tensors())
    ours = over.family.packed(trainers_latents(over, told, noise(over)))
    theirs = stock_latents(
        open_export(tmp_path / "export", dataclasses.replace(told, quantize=None), "diffusers"),
        told,
        over.family.packed(noise(over)),
    )
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
    assert (ours - made.family.packed(trainers_latents(made, told, noise(made)))).abs().max() > 1e-3


def test_a_quantized_base_is_not_fused(made, tmp_path):
    with pytest.raises(UserError, match=r"format fused: a quantized base cannot .* choose from diffusers"):
        write_export(made, tmp_path / "export", ("fused",))


def test_full_copies_of_a_quantized_base_are_refused(made):
    with pytest.raises(UserError, match=r"model.quantize: .* freezes the network, which lora: null would train"):
        load_recipe(made.recipe.model.source.replace("model-flux", "run/recipe.yaml"), ["lora=null"])


@pytest.mark.parametrize(("kind", "package"), [("int8", "torchao"), ("nf4", "bitsandbytes")])
def test_a_missing_package_is_told_with_its_extra(monkeypatch, kind, package):
    monkeypatch.setattr(extras, "installed", lambda name: name != package)
    with pytest.raises(UserError, match=rf"model.quantize {kind} needs the package {package}.*'stepdistill\[quantize\]'"):
        load_pipeline_folder("stepdistill/tiny-sd3", quantize=kind)


def test_bitsandbytes_never_packs_weights_anew(monkeypatch, tmp_path):
    """What it does on newer CPUs loses gradients; so no layer may think that it runs on one."""
    from bitsandbytes.nn import modules

    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    pipe = load_pipeline_folder("stepdistill/tiny-sd3", quantize="nf4")
    assert [m for m in pipe.transformer.modules() if type(m) is modules.Linear4bit]
    assert not any(getattr(m, "support_avx512bf16_for_cpu", False) for m in pipe.transformer.modules())
