"""Models, LoRAs and weights of others: nothing that they bring is run, and what cannot be read is named (docs/security.md)."""

import sys

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from hostile import SAFETENSORS, Opens, add, code, model, pickle, serving

from stepdistill import meta
from stepdistill.data.cache import Cache
from stepdistill.data.pairs import read_shard
from stepdistill.errors import UserError
from stepdistill.evaluate.clip import load as load_clip
from stepdistill.evaluate.references import load_reference, of_moments
from stepdistill.evaluate.weights import read_state
from stepdistill.families.load import load_pipeline_folder
from stepdistill.families.spellings import read_layers
from stepdistill.foreign import read_tensors
from stepdistill.lora_sources import find_lora
from stepdistill.merge import merge
from stepdistill.recipe import load_recipe
from stepdistill.serve import open_export
from stepdistill.show import Line
from stepdistill.sources import check_model


@pytest.fixture
def mark(tmp_path):
    """A file that must not be there in the end."""
    mark = tmp_path / "it-ran"
    yield mark
    assert not mark.exists()


def test_the_pickles_here_do_harm_where_they_are_trusted(tmp_path):
    """So that the tests below can fail; torch itself refuses them unless it is told to trust."""
    file = pickle(tmp_path / "a.bin", tmp_path / "ran")
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(file)  # as open_clip, lpips, torch-fidelity and ImageReward call it
    assert not (tmp_path / "ran").exists()
    torch.load(file, weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(("part", "name"), [("unet", "diffusion_pytorch_model.bin"), ("text_encoder", "pytorch_model.bin")])
def test_a_model_of_pickled_weights_is_refused(tmp_path, mark, part, name):
    folder = model(tmp_path / "model")
    for file in (folder / part).glob("*.safetensors"):
        file.unlink()
    pickle(folder / part / name, mark)
    with pytest.raises(UserError, match=rf"{name} is a pickled weight file.*save_pretrained\(folder, safe_serialization=True"):
        load_pipeline_folder(str(folder))


def test_pickles_and_code_beside_what_is_loaded_are_left_alone(tmp_path, mark):
    folder = model(tmp_path / "model")
    for name in ("unet/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin", "vae/model.ckpt", "model.ckpt"):
        pickle(folder / name, mark)
    for name in ("pipeline.py", "unet/net.py", "tokenizer/own.py", "text_encoder/own.py"):
        code(folder / name, mark)
    for part in ("tokenizer/tokenizer_config.json", "text_encoder/config.json"):
        add(folder / part, auto_map={"AutoModel": "own.Net", "AutoTokenizer": ["own.Net", None]})
    assert type(load_pipeline_folder(str(folder))).__name__ == "StableDiffusionPipeline"


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt", ".pth", ".pkl"])
def test_a_pickled_file_is_no_model_and_no_lora(tmp_path, mark, suffix):
    file = pickle(tmp_path / f"a{suffix}", mark)
    assert "unpickling runs whatever code" in next(check_model(str(file)))
    with pytest.raises(ValueError, match="a pickled file, which runs whatever code it holds; give the LoRA as safetensors"):
        find_lora(str(file))


def test_a_pickle_that_is_called_safetensors(tmp_path, mark):
    """Wherever weights, encodings, pairs or statistics are read."""
    file = pickle(tmp_path / "pytorch_lora_weights.safetensors", mark)
    readers = [read_tensors, read_layers, read_shard, load_reference]
    readers += [lambda path: merge([str(path), str(path)], tmp_path / "out.safetensors")]
    readers += [lambda path: open_export(path.parent, serving(), "diffusers")]
    (tmp_path / "stepdistill.json").write_text(serving().to_json())
    for read in readers:
        with pytest.raises(UserError, match=r"pytorch_lora_weights.safetensors|the export"):
            read(file)
    cache = Cache(tmp_path, "texts", {}, Line())
    there = pickle(cache.folder / "a.safetensors", mark)
    cache.list()
    assert not there.exists() and not cache.files


def test_statistics_and_networks_that_measure(tmp_path, mark):
    np.savez(tmp_path / "stats.npz", mu=np.array([Opens(mark)], object), sigma=np.array([Opens(mark)], object))
    with pytest.raises(UserError, match="holds no moments mu and sigma"):
        of_moments(tmp_path / "stats.npz", None)
    with pytest.raises(UserError, match=r"weights .* cannot be read; delete the file"):
        read_state("FID", pickle(tmp_path / "weights-inception.pth", mark))
    clip = tmp_path / "clip"
    pickle(clip / "pytorch_model.bin", mark)
    code(clip / "own.py", mark)
    add(clip / "config.json", model_type="clip", auto_map={"AutoTokenizer": "own.Net"})
    add(clip / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Net", None]})
    with pytest.raises(UserError, match=r"clip cannot be read"):
        load_clip(str(clip), torch.device("cpu"))


@pytest.mark.parametrize("wrong", SAFETENSORS)
def test_a_safetensors_file_with_a_false_header(tmp_path, wrong):
    file = tmp_path / "a.safetensors"
    file.write_bytes(SAFETENSORS[wrong])
    for read in (read_tensors, read_layers, read_shard, load_reference):
        with pytest.raises(UserError, match=r"a\.safetensors"):
            read(file)


CODE = {  # what the folder says -> its code, its index
    "a pipeline class of its own": ("pipeline.py", {"_class_name": ["pipeline", "Pipeline"]}),
    "unet, a class 'Net' of 'net'": ("unet/net.py", {"unet": ["net", "Net"]}),
    "vae, a class 'geohash' of 'antigravity'": ("x.py", {"vae": ["antigravity", "geohash"]}),
    "vae, a class 'system' of 'os'": ("x.py", {"vae": ["os", "system"]}),
    "tokenizer, a AutoTokenizer whose configuration names": (
        "tokenizer/own.py",
        {"tokenizer": ["transformers", "AutoTokenizer"]},
    ),
}


@pytest.mark.parametrize("said", CODE)
def test_code_of_a_model_folder_is_refused(tmp_path, mark, said):
    place, index = CODE[said]
    folder = model(tmp_path / "model", **index)
    code(folder / place, mark)
    add(folder / "tokenizer" / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Net", None]})
    for load in (lambda: load_pipeline_folder(str(folder)), lambda: meta.open_folder(folder)):
        with pytest.raises(UserError, match=rf"brings code: {said}.*set trust_remote_code: true in the recipe"):
            load()


def test_code_of_a_model_of_the_hub_is_refused_once_it_is_fetched(tmp_path, mark, monkeypatch):
    folder = model(tmp_path / "model", unet=["net", "Net"])
    code(folder / "unet" / "net.py", mark)
    monkeypatch.setattr(DiffusionPipeline, "download", lambda *_args, **_kwargs: str(folder))
    with pytest.raises(UserError, match=r"model.source org/name brings code: unet"):
        load_pipeline_folder("org/name")


def test_code_of_a_model_folder_runs_where_the_recipe_trusts_it(tmp_path):
    """So that the tests above can fail."""
    folder = model(tmp_path / "model", unet=["net", "Net"])
    code(folder / "unet" / "net.py", tmp_path / "ran")
    pipe = load_pipeline_folder(str(folder), trusted=True)
    assert type(pipe.unet).__name__ == "Net" and (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "index",
    ["[" * 100_000, "[]", "{", '{"_class_name": 3, "unet": [{}, []]}', '{"../x": ["diffusers", "X"]}', "\xff", " " * 5_000_000],
)
def test_a_damaged_index(tmp_path, index):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model_index.json").write_bytes(index.encode("latin-1"))
    with pytest.raises(UserError, match=r"model.source .*model_index.json cannot be read|model.source .*brings code"):
        load_pipeline_folder(str(folder))


def test_a_strategy_of_another_package_is_imported_only_where_it_is_trusted(tmp_path, monkeypatch):
    code(tmp_path / "their_strategy.py", tmp_path / "ran")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="imported only if you trust it"):
        load_recipe("quickstart", ["strategy={name: 'their_strategy:Net'}"])
    assert not (tmp_path / "ran").exists() and "their_strategy" not in sys.modules
    with pytest.raises(UserError, match="is no strategy"):
        load_recipe("quickstart", ["strategy={name: 'their_strategy:Net'}", "trust_remote_code=true"])
    assert (tmp_path / "ran").exists()
