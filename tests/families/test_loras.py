"""LoRAs that people have, below a student: added exactly, or refused."""

import json
from types import SimpleNamespace

import pytest
import torch
from loras import deltas, save, style
from pipelines import flux, sd, sdxl, wan
from students import noise, student

from stepdistill.errors import UserError
from stepdistill.export import trainers_latents, write_export
from stepdistill.families.load import quiet
from stepdistill.families.loras import fuse_loras
from stepdistill.lora_sources import find_lora
from stepdistill.sidecar import read_export


def fused(pipe, *names):
    with quiet():
        fuse_loras(pipe, [find_lora(str(name)) for name in names])
    return pipe


@pytest.mark.parametrize(("make", "net"), [(sd, "unet"), (sdxl, "unet"), (flux, "transformer")])
def test_what_is_fused_is_the_sum_of_deltas(tmp_path, make, net):
    pipe = make()
    parts = [style(getattr(pipe, net), net, rank, seed) for rank, seed in ((3, 0), (2, 1))]
    a, b = (save(part, tmp_path / f"{k}.safetensors") for k, part in enumerate(parts))
    before = {name: p.clone() for name, p in getattr(pipe, net).named_parameters()}
    fused(pipe, f"{a}@0.5", b)
    added = [deltas(part) for part in parts]
    after = dict(getattr(pipe, net).named_parameters())
    assert after.keys() == before.keys()  # nothing of PEFT is left
    for name, p in after.items():
        layer = f"{net}.{name.removesuffix('.weight')}"
        expected = before[name] + (0.5 * added[0][layer] + added[1][layer] if layer in added[0] else 0)
        torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-6)


def test_a_lora_of_the_text_encoder_is_fused_too(tmp_path):
    pipe = sd()
    state = style(pipe.text_encoder, "text_encoder", layers=("q_proj", "v_proj"))
    added = {key.removeprefix("text_encoder."): x for key, x in deltas(state).items()}
    before = {name: pipe.text_encoder.get_submodule(name).weight.clone() for name in added}
    fused(pipe, save(state | style(pipe.unet), tmp_path / "a.safetensors"))
    for name, delta in added.items():
        torch.testing.assert_close(pipe.text_encoder.get_submodule(name).weight, before[name] + delta)


def another_shape():
    return style(sdxl().unet)


def one_layer_more():
    state = style(sd().unet)
    return state | {
        key.replace("down_blocks.1", "down_blocks.7"): x.clone() for key, x in state.items() if "down_blocks.1" in key
    }


REFUSED = {
    "another network": (lambda: style(flux().transformer, "transformer"), "layers fit nothing, the first is transformer"),
    "another width": (another_shape, "no LoRA of this StableDiffusionPipeline"),
    "more layers": (one_layer_more, "no LoRA of this StableDiffusionPipeline"),
    "no LoRA": (lambda: {"weight": torch.ones(2)}, "no LoRA of this StableDiffusionPipeline"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_lora_of_another_architecture_is_refused(tmp_path, case):
    make, told = REFUSED[case]
    file = save(make(), tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=told) as caught:
        fused(sd(), file)
    assert str(file) in str(caught.value) and "give one made for this architecture" in str(caught.value)


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(UserError, match="no LoRA of this"):
        fused(sd(), tmp_path / "a.safetensors")


def test_a_pipeline_that_loads_no_loras():
    with pytest.raises(UserError, match="SimpleNamespace loads no LoRAs"):
        fuse_loras(SimpleNamespace(), [find_lora("org/name")])


@pytest.fixture(scope="module")
def styled(tmp_path_factory):
    """A student that was distilled over a style LoRA at half its scale, and that LoRA."""
    folder = tmp_path_factory.mktemp("styled")
    file = save(style(sd().unet), folder / "style.safetensors")
    return student(folder, "eps", f"model.loras=[{file}@0.5]"), file


def test_two_experts_are_not_given_half_a_lora():
    with pytest.raises(UserError, match="has two experts, and diffusers puts a LoRA on the first alone"):
        fuse_loras(wan(boundary_ratio=0.875), [find_lora("org/name")])


def test_a_student_over_a_lora_is_exported_in_every_format(styled, tmp_path):
    distillation, file = styled
    assert "checked: " in write_export(distillation, tmp_path / "e", ("diffusers", "kohya", "fused"))
    told = read_export(tmp_path / "e")
    assert [(str(lora), lora.scale) for lora in told.loras] == [(str(file), 0.5)]
    assert json.loads((tmp_path / "e" / "stepdistill.json").read_text())["loras"][0]["file"] == "style.safetensors"
    added = {key.removeprefix("unet."): x for key, x in deltas(style(sd().unet)).items()}
    teacher, plain = distillation.family.net, sd().unet
    for name, delta in added.items():  # the teacher is the model with the LoRA
        weight = teacher.get_submodule(name).get_base_layer().weight
        torch.testing.assert_close(weight, plain.get_submodule(name).weight + 0.5 * delta, rtol=1e-5, atol=1e-6)


def test_a_whole_copy_over_a_lora_holds_it(tmp_path):
    file = save(style(sd().unet), tmp_path / "style.safetensors")
    made = student(tmp_path, "eps", f"model.loras=[{file}]", "lora=null")
    assert "checked: pipeline" in write_export(made, tmp_path / "e")


def test_a_fine_tuned_base_is_another_model(styled, tmp_path):
    """The same student on the model into which the LoRA was merged: the same samples as on the model and the LoRA."""
    pipe = fused(sd(), f"{styled[1]}@0.5")
    pipe.save_pretrained(tmp_path / "model-eps", safe_serialization=True)
    tuned = student(tmp_path, "eps")
    write_export(tuned, tmp_path / "e", ("diffusers",))
    told = read_export(tmp_path / "e")
    assert told.loras == () and told.base == str(tmp_path / "model-eps")
    ours, theirs = (trainers_latents(made, told, noise(made)) for made in (tuned, styled[0]))
    assert (ours - theirs).abs().max() < 1e-4
