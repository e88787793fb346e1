"""What a recipe names - model, prompts, pictures - is refused before any work if it cannot serve."""

import sys

import pytest
from written import only, problems, swapped, write

from stepdistill.recipe import RecipeError, load_recipe


def test_missing_model(root):
    assert "does not exist" in only(write(root, swapped("{root}/teacher", "./nowhere")))
    assert "does not exist" in only(write(root, swapped("{root}/teacher", "a/b/c")))
    assert "does not exist" in only(write(root, swapped("{root}/teacher", "weights")))
    assert "is no embedded model" in only(write(root, swapped("{root}/teacher", "stepdistill/tinysd")))


def test_hub_id_is_left_to_diffusers(root):
    assert load_recipe(write(root, swapped("{root}/teacher", "org/FLUX.1-dev"))).model.source == "org/FLUX.1-dev"


def test_folder_that_is_no_pipeline(root):
    assert "is not a pipeline: it has no model_index.json" in only(write(root, swapped("/teacher", "/pictures")))
    assert "is a file, but a pipeline is a folder" in only(write(root, swapped("/teacher", "/prompts.txt")))
    index = root / "teacher" / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "PixArtAlphaPipeline"))
    load_recipe(write(root))  # no family is written for it, but diffusers has it
    index.write_text(index.read_text().replace("PixArtAlphaPipeline", "MyPipeline"))
    assert "holds a MyPipeline, which the installed diffusers lacks; well known are" in only(write(root))
    index.write_text("{")
    assert "cannot be read" in only(write(root))


def test_pipeline_without_a_part(root):
    (root / "teacher" / "vae").rename(root / "elsewhere")
    assert "lacks its folder vae" in only(write(root))


def test_variant_without_weights(root):
    found = problems(write(root), "model.variant=fp16")
    assert "unet has no weights of the variant fp16, only diffusion_pytorch_model.safetensors" in found[0]


@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pt", ".pth"])
def test_pickled_weights_are_refused(root, suffix):
    unet = root / "teacher" / "unet"
    pickled = unet / f"diffusion_pytorch_model{suffix}"
    pickled.write_bytes(b"weights")
    load_recipe(write(root))  # a safetensors twin lies beside it, and is what is read
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    text = only(write(root))
    assert f"unet/{pickled.name} is a pickled weight file, and unpickling runs whatever code it holds" in text
    assert "save the model as safetensors" in text
    assert "pickled" in only(write(root, swapped("{root}/teacher", str(pickled))))


def test_prompts(root):
    prompts = root / "prompts.txt"
    prompts.write_text(" \n\n")
    assert only(write(root)) == f"{root}/my.yaml:9  data.prompts: {prompts} is empty; write one prompt a line"
    prompts.write_bytes(b"\xff\xfe\xff")
    assert "is not text in UTF-8" in only(write(root))
    (root / "prompts.xlsx").write_bytes(b"sheet")
    assert "is not a file of prompts (.txt, .jsonl, .csv, .parquet)" in only(
        write(root, swapped("prompts.txt", "prompts.xlsx"))
    )
    prompts.unlink()
    assert "does not exist" in only(write(root))
    prompts.mkdir()
    assert "is a folder" in only(write(root))


def test_prompts_of_the_package(root):
    assert load_recipe(write(root), ["data.prompts=stepdistill/prompts"]).data.prompts == "stepdistill/prompts"
    assert "is no source of prompts; did you mean 'stepdistill/prompts'?" in only(
        write(root), "data.prompts=stepdistill/promts"
    )


def test_parquet_wants_pyarrow(root, monkeypatch):
    (root / "some.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "not installed: pip install 'stepdistill[data]'" in only(write(root), f"data.prompts={root}/some.parquet")


@pytest.mark.parametrize("key", ["model.source", "data.prompts", "data.images", "pairs.folder"])
def test_what_is_not_there_yet_is_checked_for_its_form_alone(root, key):
    absent = f"{key}={root}/absent.txt"
    strategy = ["strategy={name: dmd}"] if key.startswith("pairs") else []
    section, name = key.split(".")
    recipe = load_recipe(write(root), [absent, *strategy], there=False)
    assert getattr(getattr(recipe, section), name) == f"{root}/absent.txt"
    assert key in only(write(root), absent, *strategy)
    with pytest.raises(RecipeError, match="is no embedded model"):
        load_recipe(write(root), ["model.source=stepdistill/none"], there=False)


def test_pictures(root):
    (root / "pictures" / "c.JPG").write_bytes(b"picture without a caption: it will be left out")
    load_recipe(write(root))
    for file in (root / "pictures").iterdir():
        file.unlink()
    assert "holds no pictures" in only(write(root))
    (root / "pictures").rmdir()
    assert "does not exist" in only(write(root))
