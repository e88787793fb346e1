"""The LoRA files of an export, tensor by tensor, and in stock diffusers."""

import json
import re

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from students import noise

from stepdistill import export
from stepdistill.export import write_export
from stepdistill.lora_files import kohya_header
from stepdistill.sidecar import read_export


def test_the_diffusers_file(made):
    distillation, out = made["lcm-eps"]
    assert {p.name for p in out.iterdir()} == {
        *("README.md", "pytorch_lora_weights.safetensors", "tiny_kohya.safetensors", "scheduler", "stepdistill.json"),
        *("comfyui_workflow.json", "gallery"),
    }
    with safe_open(out / "pytorch_lora_weights.safetensors", "pt") as file:
        header, keys = file.metadata(), list(file.keys())
        tensors = {key: file.get_tensor(key) for key in keys}
    assert all(re.fullmatch(r"unet\.[a-z0-9_.]+\.lora_[AB]\.weight", key) for key in keys)
    assert header.keys() == {"format", "stepdistill.inference"}  # neither adapter metadata nor alphas
    assert json.loads(header["stepdistill.inference"]) == json.loads((out / "stepdistill.json").read_text())
    average = distillation.roles.student_ema.named_parameters()
    assert tensors.keys() == {f"unet.{name}" for name in average}
    for name, p in average.items():  # the average is what was exported, not the student
        assert torch.equal(tensors[f"unet.{name}"], p) and tensors[f"unet.{name}"].dtype == torch.float32
    assert all(x.shape[0] == 4 for key, x in tensors.items() if "lora_A" in key)  # alpha = rank is what loaders assume


def test_the_kohya_file(made):
    _, out = made["lcm-eps"]
    state = load_file(out / "tiny_kohya.safetensors")
    modules = {key.rsplit(".", 2 if key.endswith("weight") else 1)[0] for key in state}
    peft = {key.split(".lora_")[0] for key in load_file(out / "pytorch_lora_weights.safetensors")}
    assert modules == {"lora_" + name.replace(".", "_") for name in peft}
    for module in modules:
        down, up, alpha = (state[f"{module}.{end}"] for end in ("lora_down.weight", "lora_up.weight", "alpha"))
        assert alpha.shape == () and alpha.item() == down.shape[0] == up.shape[1] == 4
    convolution = state["lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight"]
    assert convolution.shape == (4, 8, 3, 3)
    with safe_open(out / "tiny_kohya.safetensors", "pt") as file:
        header = file.metadata()
    assert "lora_adapter_metadata" not in header  # beside alphas diffusers refuses it
    assert header["ss_network_dim"] == "4" and header["ss_network_module"] == "networks.lora"
    assert header["modelspec.usage_hint"].startswith("4 steps, sampler lcm, scheduler simple, cfg 1.0")
    assert "modelspec.architecture" not in header  # the text of this base is 16 wide: no base that is known


@pytest.mark.parametrize(
    ("width", "architecture", "version"),
    [
        (768, "stable-diffusion-v1/lora", "sd_v1"),
        (1024, "stable-diffusion-v2-512/lora", "sd_v2"),
        (2048, "stable-diffusion-xl-v1-base/lora", "sdxl_base_v1-0"),
    ],
)
def test_the_kohya_header_names_the_base(made, width, architecture, version):
    _, out = made["lcm-eps"]
    header = kohya_header(load_file(out / "tiny_kohya.safetensors"), read_export(out), width, "eps")
    assert (header["modelspec.architecture"], header["ss_base_model_version"]) == (architecture, version)


def test_the_kohya_file_gives_the_same_samples(made):
    distillation, out = made["lcm-eps"]
    told = read_export(out)
    a, b = (export.stock_latents(export.open_export(out, told, form), told, noise(distillation)) for form in told.files)
    assert list(told.files) == ["diffusers", "kohya"] and (a - b).abs().max() <= 1e-5


def test_fused(made, tmp_path):
    distillation, _ = made["lcm-flow"]
    finding = write_export(distillation, tmp_path / "e", ("fused",))
    assert re.fullmatch("checked: fused, in stock diffusers: the trainer's latents to .*", finding)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "e" / "fused", dtype=torch.float32)
    assert not hasattr(pipe.transformer, "peft_config")
    assert "fused" in (tmp_path / "e" / "README.md").read_text()
