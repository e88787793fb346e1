"""`stepdistill merge`: the result adds to each weight exactly what its sources add together, in stock diffusers too."""

import json
from pathlib import Path

import comfy
import pytest
import torch
from loras import deltas, save, style
from pipelines import flux, sd, sdxl
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stepdistill.errors import UserError
from stepdistill.families.load import quiet
from stepdistill.families.spellings import Layer, read_layers
from stepdistill.kohya import kohya_state
from stepdistill.lora_sources import NAME
from stepdistill.merge import compressed, merge, relative_error, total

MAKE = {"sd": (sd, "unet"), "sdxl": (sdxl, "unet"), "flux": (flux, "transformer")}


@pytest.fixture(scope="module", params=MAKE)
def world(request, tmp_path_factory):
    """A pipeline, two LoRAs for it of different ranks and layers (b also in another spelling), and their sum 1 a - 0.5 b."""
    make, part = MAKE[request.param]
    folder, pipe = tmp_path_factory.mktemp(request.param), make()
    net = getattr(pipe, part)
    a, b = style(net, part, 3, 0), style(net, part, 2, 1, ("to_q", "to_out.0", "conv2", "ff.net.2"))
    if part == "unet":
        layers = ("q_proj", "out_proj", "fc1")  # from an out_proj diffusers tells kohya's spelling
        a |= style(pipe.text_encoder, "text_encoder", 3, 4, layers)
    for name, state in (("a", a), ("b", b)):
        save(state, folder / f"{name}.safetensors")
    if part == "unet":  # alpha is half the rank, so twice the weights
        half = {key.removeprefix("unet."): x * (2 if "lora_B" in key else 1) for key, x in b.items()}
        save(kohya_state(half, "lora_unet_", 1), folder / "b.safetensors")
    expected = {spelt(name): x.clone() for name, x in deltas(a).items()}
    for name, x in deltas(b).items():
        expected[spelt(name)] = expected.get(spelt(name), 0) - 0.5 * x
    return make, folder, expected


def spelt(name):
    return name.replace("text_encoder.encoder.", "text_encoder.text_model.encoder.")


def test_the_sum_is_exact(world, tmp_path):
    _, folder, expected = world
    told = merge([str(folder / "a.safetensors"), str(folder / "b.safetensors")], tmp_path / "c.safetensors", [1.0, -0.5])
    assert told.endswith(f"c.safetensors: 2 LoRAs, {len(expected)} layers, rank 5, exact")
    state = load_file(tmp_path / "c.safetensors")
    made = deltas(state)
    assert made.keys() == expected.keys()
    for name, x in made.items():
        torch.testing.assert_close(x, expected[name], rtol=1e-5, atol=1e-5)
    assert {len(x) for key, x in state.items() if "lora_A" in key} == {5}  # mixed ranks are mistaken by older diffusers
    with safe_open(tmp_path / "c.safetensors", "pt") as file:
        about = json.loads(file.metadata()["stepdistill.merge"])
    assert about["sources"] == [{"file": "a.safetensors", "weight": 1.0}, {"file": "b.safetensors", "weight": -0.5}]


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_stock_diffusers_loads_the_sum(world, tmp_path, form):
    make, folder, expected = world
    if "transformer" in next(iter(expected)):
        with pytest.raises(UserError, match="layers of a transformer"):
            merge([str(folder / "a.safetensors")], tmp_path / "c.safetensors", form="kohya")
        form = "diffusers"
    merge([str(folder / "a.safetensors"), f"{folder}/b.safetensors@-0.5"], tmp_path / "c.safetensors", form=form)
    pipe, plain = make(), make()
    with quiet():
        pipe.load_lora_weights(tmp_path, weight_name="c.safetensors")
        parts = [name for name in ("unet", "transformer", "text_encoder") if hasattr(pipe, name)]
        pipe.fuse_lora(components=parts)
        pipe.unload_lora_weights()
    for name, x in expected.items():
        part, _, layer = name.partition(".")
        layer = layer if hasattr(getattr(pipe, part), "text_model") else layer.removeprefix("text_model.")
        got, base = (getattr(it, part).get_submodule(layer).weight for it in (pipe, plain))
        torch.testing.assert_close(got - base, x, rtol=1e-4, atol=1e-5)


def test_the_kohya_spelling_is_comfyuis(world, tmp_path):
    make, folder, _ = world
    if make is not flux:
        merge([str(folder / "b.safetensors")], tmp_path / "c.safetensors", form="kohya")
        known = comfy.unet(1, (0, 1) if make is sd else (0, 2), 2)
        assert {key.split(".")[0] for key in load_file(tmp_path / "c.safetensors")} <= known


@pytest.mark.parametrize("shape", [(12, 7), (6, 4, 3, 3)])
def test_compression_keeps_the_largest_singular_values(shape):
    generator = torch.Generator().manual_seed(0)
    out, into, *kernel = shape
    layer = Layer(
        torch.randn(5, into, *kernel, generator=generator), torch.randn(out, 5, *(1 for _ in kernel), generator=generator)
    )
    full = (layer.up.flatten(1) @ layer.down.flatten(1)).double()
    values = torch.linalg.svdvals(full)
    for rank in (1, 3, 5, 9):
        small = compressed(layer, rank)
        assert small.down.shape[1:] == layer.down.shape[1:] and small.up.shape[2:] == layer.up.shape[2:]
        assert len(small.down) == min(rank, 5)
        got = (full - small.up.flatten(1).double() @ small.down.flatten(1).double()).norm() / full.norm()
        best = (values[rank:].norm() / values.norm()).item()
        assert got.item() == pytest.approx(best, abs=1e-5)
        assert relative_error({"x": layer}, {"x": small}) == pytest.approx(best, abs=1e-5)


def test_the_error_of_a_compression_is_told(world, tmp_path):
    _, folder, expected = world
    told = merge([f"{folder}/a.safetensors", f"{folder}/b.safetensors@-0.5"], tmp_path / "c.safetensors", rank=2)
    made = deltas(load_file(tmp_path / "c.safetensors"))
    lost = sum((made[name] - x).square().sum() for name, x in expected.items()) / sum(
        x.square().sum() for x in expected.values()
    )
    assert f"rank 2, compressed, relative error {lost.sqrt().item():.2g}" in told


def test_a_weight_multiplies_once():
    layer = Layer(torch.ones(1, 1), torch.ones(1, 1))
    (summed,) = total([({"x": layer}, 3.0)]).values()
    assert (summed.up @ summed.down).item() == 3


def test_alphas_of_peft_are_read(tmp_path):
    state = style(sd().unet)
    about = {"unet.lora_alpha": 6, "unet.r": 3, "unet.alpha_pattern": {"conv_in": 1}}
    save_file(state, tmp_path / "a.safetensors", {"format": "pt", "lora_adapter_metadata": json.dumps(about)})
    layers = read_layers(tmp_path / "a.safetensors")
    for name, layer in layers.items():
        torch.testing.assert_close((layer.up.flatten(1) @ layer.down.flatten(1)), 2 * deltas(state)[name].flatten(1))


def test_what_a_run_folder_exported(exported_eps, tmp_path):
    _, run = exported_eps
    merge([str(run)], tmp_path / "c.safetensors")
    ours, theirs = (deltas(load_file(file)) for file in (tmp_path / "c.safetensors", run / "export" / NAME))
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        torch.testing.assert_close(x, theirs[name])


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(style(sd().unet), tmp_path / "sd.safetensors")
    save(style(sdxl().unet), tmp_path / "sdxl.safetensors")
    save(style(flux().transformer, "transformer"), tmp_path / "flux.safetensors")
    save({"unet.x.dora_scale": torch.ones(1), "unet.x.lora_A.weight": torch.ones(1)}, tmp_path / "dora.safetensors")
    save({"diffusion_model.x.lora_up.weight": torch.ones(1, 1)}, tmp_path / "half.safetensors")
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("sources", "options", "told"),
    [
        (["sd.safetensors", "sdxl.safetensors"], {}, "different architectures: unet.down_blocks.1.attentions.0.*in the other"),
        (["sd.safetensors", "flux.safetensors"], {}, "no layer in common"),
        (["sd.safetensors"], {"weights": [1.0, 2.0]}, "--weights has 2 numbers for 1 LoRAs"),
        (["empty"], {}, "no .safetensors file"),
        (["org/name"], {}, "is a hub id; fetch it first: hf download org/name"),
        (["dora.safetensors"], {}, "dora_scale"),
        (["half.safetensors"], {}, "spelling"),
        (["sd.safetensors"], {"out": "sd.safetensors"}, "exists and is not overwritten"),
        (["sd.safetensors"], {"out": "x.bin"}, "must end in .safetensors"),
        (["sd.safetensors"], {"out": "no/x.safetensors"}, "mkdir -p no"),
    ],
)
def test_what_cannot_be_merged(shelf, sources, options, told):
    options = {"out": "out.safetensors", **options}
    with pytest.raises(UserError, match=told):
        merge(sources, Path(options.pop("out")), **options)
    assert not (shelf / "out.safetensors").exists()
