"""The layers that wear a LoRA on every known model, asserted against the maps that ship: layers, shapes, exported keys."""

import pytest
import torch

from stepdistill.architectures import known
from stepdistill.families import FAMILIES
from stepdistill.key_maps import KEYS, expand, find_layers, pack, read_map, role_weights
from stepdistill.kohya import kohya_state
from stepdistill.lora_files import peft_state

MODELS = [name for name, a in known().items() if a.pipeline in FAMILIES]
QUICK = ["sd15", "flux2-klein-4b", "wan21-1.3b"]


def assert_as_written(name):
    told, weights = read_map(name), role_weights(known()[name])
    assert find_layers(weights) == told
    family = FAMILIES[known()[name].pipeline]
    state = peft_state({key: torch.empty(shape) for key, shape in weights.items()}, family.net_name)
    assert set(state) == {f"{family.net_name}.{layer}.lora_{side}.weight" for layer in told for side in "AB"}
    for layer, (inputs, outputs, *kernel) in told.items():
        assert state[f"{family.net_name}.{layer}.lora_A.weight"].shape == (1, inputs, *kernel)
        assert state[f"{family.net_name}.{layer}.lora_B.weight"].shape == (outputs, 1, *[1] * len(kernel))
    if family.kohya_prefix and family.net_name == "unet":
        kohya = kohya_state({key: torch.empty(shape) for key, shape in weights.items()}, family.kohya_prefix, 1)
        stems = [family.kohya_prefix + layer.replace(".", "_") for layer in told]
        assert set(kohya) == {f"{stem}.{end}" for stem in stems for end in ("lora_down.weight", "lora_up.weight", "alpha")}


@pytest.mark.parametrize("name", QUICK)
def test_the_lora_of_a_known_model_is_as_its_map_says(name):
    assert_as_written(name)


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in MODELS if name not in QUICK])
def test_the_lora_of_every_other_known_model_is_as_its_map_says(name):
    assert_as_written(name)


def test_every_model_with_a_family_has_a_map_and_all_are_small():
    assert {file.stem for file in KEYS.glob("*.json")} == set(MODELS)
    assert sum(file.stat().st_size for file in KEYS.glob("*.json")) < 300_000


def test_packing_loses_nothing():
    layers = {f"down.{i}.block.{j}.to_q": (8, 8) for i in range(3) for j in range(i + 1)} | {
        "net.2": (4, 4),
        "net.0.proj": (4, 8),
        "mid.conv": (4, 4, 3, 3),
        "down.7.block.0.to_q": (8, 8),
    }
    packed = pack(layers)
    assert {layer: shape for pattern, shape in packed.items() for layer in expand(pattern)} == layers
    assert len(packed) < len(layers)
    assert expand("a.{0..1}.b.{3..4}.c") == ["a.0.b.3.c", "a.0.b.4.c", "a.1.b.3.c", "a.1.b.4.c"]
