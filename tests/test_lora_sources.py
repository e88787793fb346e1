"""The names of LoRAs: what they mean, and why others are refused."""

import json

import pytest
from written import only, write

from stepdistill.lora_sources import NAME, LoraSource, find_lora, identities
from stepdistill.recipe import dump_recipe, load_recipe
from stepdistill.sources import PAIRS, check_pairs


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """Folders of LoRAs, in the current folder; none is opened."""
    monkeypatch.chdir(tmp_path)
    for name in (
        f"mine/{NAME}",
        "mine/other.safetensors",
        "run/export/a.safetensors",
        "two/a.safetensors",
        "two/b.safetensors",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "old.bin").write_bytes(b"")
    (tmp_path / "bare").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("text", "place", "file", "scale"),
    [
        ("mine", "{}/mine", NAME, 1.0),
        ("mine/other.safetensors@0.8", "{}/mine", "other.safetensors", 0.8),
        ("./run@-1", "{}/run/export", "a.safetensors", -1.0),
        ("org/name", "org/name", NAME, 1.0),
        ("org/name@0.5", "org/name", NAME, 0.5),
        ("org/name/deep/er.safetensors@2", "org/name", "deep/er.safetensors", 2.0),
    ],
)
def test_what_a_name_means(shelf, text, place, file, scale):
    found = find_lora(text)
    assert found == LoraSource(place.format(shelf), file, scale)
    assert (found.path is None) == text.startswith("org")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("nowhere.safetensors", "does not exist"),
        ("mine@0", "must be a finite number other than 0"),
        ("mine@inf", "must be a finite number other than 0"),
        ("old.bin", "pickled"),
        ("two", r"several LoRA files \(a.safetensors, b.safetensors\)"),
        ("bare", "no .safetensors file"),
    ],
)
def test_names_that_mean_nothing(shelf, text, told):
    with pytest.raises(ValueError, match=told):
        find_lora(text)


def test_a_recipe_names_loras(root, shelf):
    recipe = load_recipe(write(root), ["model.loras=[mine@0.8, org/style]"])
    assert recipe.model.loras == ("mine@0.8", "org/style")
    assert load_recipe(write(root, dump_recipe(recipe))) == recipe
    assert "model.loras: nowhere does not exist" in only(write(root), "model.loras=[nowhere]")


def test_pairs_of_a_teacher_with_other_loras_are_refused(shelf):
    made = {"source": "org/m", "revision": None, "variant": None, "count": 1, "shard": 1}
    (shelf / PAIRS).write_text(json.dumps(made))
    (shelf / "pairs-00000.safetensors").touch()
    model = {"source": "org/m", "revision": None, "variant": None}
    assert not list(check_pairs(str(shelf), model | {"loras": identities(())}))
    (told,) = check_pairs(str(shelf), model | {"loras": identities(("mine",))})
    assert "another teacher (loras None, not" in told
    (shelf / PAIRS).write_text(json.dumps(made | {"loras": identities(("mine",))}))
    assert not list(check_pairs(str(shelf), model | {"loras": identities((f"{shelf}/mine@1",))}))
