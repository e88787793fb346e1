"""Kohya's spelling: joined layers are exact, diffusers' own reader takes them apart again, and ComfyUI knows all names."""

import inspect
import re

import comfy
import pipelines
import pytest
import torch
from accelerate import init_empty_weights
from diffusers import FluxPipeline, FluxTransformer2DModel, UNet2DConditionModel
from diffusers.loaders import lora_conversion_utils, lora_pipeline
from safetensors.torch import load_file, save_file
from students import student

from stepdistill.errors import UserError
from stepdistill.export import ExportMismatch, check_export, write_export
from stepdistill.export_files import no_place
from stepdistill.families import flux
from stepdistill.families.flux import Flux
from stepdistill.families.sd import SD
from stepdistill.kohya import flux_layers, kohya_state
from stepdistill.lora_files import peft_state

RANK = 2


def weights(shapes, rank=RANK):
    """Random LoRA weights by name, for layers of [out, in] or [out, in, k, k]."""
    generator, made = torch.Generator().manual_seed(0), {}
    for name, (out, into, *kernel) in shapes.items():
        made[f"{name}.lora_A.weight"] = torch.randn(rank, into, *kernel, generator=generator)
        made[f"{name}.lora_B.weight"] = torch.randn(out, rank, *(1 for _ in kernel), generator=generator)
    return made


def shapes(net, targets):
    return {n: m.weight.shape for n, m in net.named_modules() if n.endswith(targets) and getattr(m, "weight", None) is not None}


@pytest.fixture(scope="module")
def real():
    """FLUX.1's own widths with two blocks of each kind: its LoRA, the channels of its layers."""
    with init_empty_weights():
        net = FluxTransformer2DModel(num_layers=2, num_single_layers=2, guidance_embeds=True)
    return weights(shapes(net, EVERY)), outputs(net)


@pytest.fixture(scope="module")
def tiny():
    """The same at tiny widths."""
    net = pipelines.flux().transformer
    return weights(shapes(net, EVERY)), outputs(net)


EVERY = (*Flux.lora_targets, "x_embedder", "context_embedder", "linear_1", "linear_2")


def outputs(net):
    return {name: m.out_features for name, m in net.named_modules() if hasattr(m, "out_features")}


def delta(state, layer):
    down, up, alpha = (state[f"{layer}.{end}"] for end in ("lora_down.weight", "lora_up.weight", "alpha"))
    return alpha / len(down) * up @ down


def test_joined_layers_have_each_its_own_outputs(tiny):
    made, out = tiny
    state = kohya_state(made, "lora_unet_", RANK, flux_layers(2, 2), out)
    for theirs, ours in flux_layers(2, 2).items():
        got = delta(state, "lora_unet_" + theirs.replace(".", "_"))
        expected = torch.cat([made[f"{name}.lora_B.weight"] @ made[f"{name}.lora_A.weight"] for name in ours])
        if theirs == "final_layer.adaLN_modulation.1":  # (shift, scale) there, (scale, shift) here
            expected = expected.roll(len(expected) // 2, 0)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    ranks = {key.split("_", 2)[-1]: len(x) for key, x in state.items() if key.endswith("lora_down.weight")}
    assert ranks["double_blocks_0_img_attn_qkv.lora_down.weight"] == 3 * RANK
    assert ranks["single_blocks_1_linear1.lora_down.weight"] == 4 * RANK


def test_diffusers_reads_back_every_tensor(real):
    made, out = real
    read = FluxPipeline.lora_state_dict(kohya_state(made, "lora_unet_", RANK, flux_layers(2, 2), out))
    read = {key.removeprefix("transformer."): x for key, x in read.items()}  # it forgets the prefix outside the blocks
    assert read.keys() == made.keys()
    assert all(torch.equal(read[key], made[key]) for key in made)


def test_a_layer_that_was_not_trained_is_zero_among_those_it_is_joined_with(tiny):
    made, out = tiny
    some = {key: x for key, x in made.items() if key.startswith("single_transformer_blocks.0.attn.to_k")}
    state = kohya_state(some, "lora_unet_", RANK, flux_layers(2, 2), out)
    assert {key.split(".")[0] for key in state} == {"lora_unet_single_blocks_0_linear1"}
    expected = torch.zeros(7 * 32, 32)
    expected[32:64] = some["single_transformer_blocks.0.attn.to_k.lora_B.weight"] @ next(iter(some.values()))
    torch.testing.assert_close(delta(state, "lora_unet_single_blocks_0_linear1"), expected)


def test_a_layer_without_a_place_is_named(real):
    with pytest.raises(ValueError, match=r"no place for transformer_blocks\.5\.attn\.to_q$"):
        kohya_state(weights({"transformer_blocks.5.attn.to_q": (4, 4)}), "lora_unet_", RANK, flux_layers(2, 2), {})


def layers(state):
    """The names of the layers that a file's tensors are of."""
    return {re.sub(r"\.(lora_(A|B|up|down)\.weight|alpha)$", "", key) for key in state}


def test_comfyui_knows_every_layer_of_flux(real):
    made, out = real
    known = comfy.flux(2, 2)
    assert layers(kohya_state(made, "lora_unet_", RANK, flux_layers(2, 2), out)) <= known
    assert layers(peft_state(made, "transformer")) <= known


UNETS = {
    "sd15": ({"cross_attention_dim": 768}, (2, (1, 1, 1, 0), 1)),
    "sdxl": (
        {
            **{"block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10), "cross_attention_dim": 2048},
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        },
        (2, (0, 2, 10), 10),
    ),
}


@pytest.mark.parametrize("name", UNETS)
def test_comfyui_knows_every_layer_of_the_real_unets(name):
    config, depth = UNETS[name]
    with init_empty_weights():
        net = UNet2DConditionModel(**config)
    names = [f"{layer}.lora_{which}.weight" for layer in shapes(net, SD.lora_targets) for which in "AB"]
    assert len(names) > 500
    state = kohya_state(dict.fromkeys(names, torch.zeros(1)), "lora_unet_", 1)
    assert layers(state) <= comfy.unet(*depth)
    lost = {layer for layer in layers(peft_state(dict.fromkeys(names, torch.zeros(1)), "unet"))} - comfy.unet(*depth)
    assert any("to_q" in layer for layer in lost)  # so the spelling of diffusers would lose its attention there


def test_comfyui_knows_every_layer_of_the_written_files(made):
    for case, known in (("lcm-eps", comfy.unet(1, (0, 1), 1)), ("lcm-sdxl", comfy.unet(1, (0, 2), 2))):
        assert layers(load_file(made[case][1] / "tiny_kohya.safetensors")) <= known
    assert layers(load_file(made["lcm-flow"][1] / "pytorch_lora_weights.safetensors")) <= comfy.sd3(3)
    assert layers(load_file(made["dmd2-flux-renoising"][1] / "pytorch_lora_weights.safetensors")) <= comfy.flux(2, 2)


@pytest.fixture
def narrow(monkeypatch):
    """Diffusers' reader, and what we know of it, at the width of the tiny network."""
    source = inspect.getsource(lora_conversion_utils._convert_kohya_flux_lora_to_diffusers)
    assert "[3072, 3072, 3072, 12288]" in source
    space = dict(vars(lora_conversion_utils))
    exec(source.replace("[3072, 3072, 3072, 12288]", "[32, 32, 32, 128]"), space)
    monkeypatch.setattr(lora_pipeline, "_convert_kohya_flux_lora_to_diffusers", space["_convert_kohya_flux_lora_to_diffusers"])
    monkeypatch.setattr(flux, "WIDTH", 32)


def test_a_flux_student_in_stock_diffusers(narrow, tmp_path):
    distillation = student(tmp_path, "flux", "data.resolution=16", strategy="{name: dmd2, guidance: 1, renoise: true}")
    finding = write_export(distillation, tmp_path / "e")
    assert "pytorch_lora_weights.safetensors and tiny_kohya.safetensors, in stock diffusers" in finding
    file = tmp_path / "e" / "tiny_kohya.safetensors"
    state = load_file(file)
    for layer in ("single_blocks_0_linear1", "final_layer_adaLN_modulation_1"):
        key = f"lora_unet_{layer}.lora_up.weight"
        save_file(state | {key: state[key].roll(len(state[key]) // 2, 0)}, file)
        with pytest.raises(ExportMismatch):
            check_export(distillation, tmp_path / "e")


def test_a_width_that_diffusers_does_not_read(made, tmp_path):
    distillation = made["dmd2-flux-renoising"][0]
    with pytest.raises(UserError, match="of a width of 3072 alone, and this network's is 32; choose from diffusers, fused"):
        write_export(distillation, tmp_path / "e", ("kohya",))


def test_layers_that_kohyas_files_cannot_hold_are_named(made, monkeypatch, tmp_path):
    monkeypatch.setattr(flux, "WIDTH", 32)
    monkeypatch.setattr(Flux, "kohya_layers", flux_layers(2, 1))
    with pytest.raises(UserError, match=r"have no place for single_transformer_blocks\.1\.attn\.to_k"):
        write_export(made["dmd2-flux-renoising"][0], tmp_path / "e", ("kohya",))
    assert no_place(made["lcm-eps"][0]) == ""
