"""Students made again of an export alone: they give what the trainer's give, and what cannot be is said."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from students import CASES, PROMPTS, noise, student

from stepdistill.assemble import restore
from stepdistill.errors import UserError
from stepdistill.export import trainers_latents, write_export
from stepdistill.inference import published, recipe_hash
from stepdistill.recipe import to_tree
from stepdistill.sidecar import read_export

FEW = ("lcm-eps", "lcm-told-guidance", "phased-wan-whole")
LORA = "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("case", [*FEW, *(pytest.param(case, marks=pytest.mark.long) for case in CASES if case not in FEW)])
def test_students_of_an_export_are_the_trainers(made, case, tmp_path):
    """Moved elsewhere, without its run: also averages, students who take turns, experts, and whole copies."""
    distillation, out = made[case]
    moved = shutil.copytree(out, tmp_path / "elsewhere")
    told, again = read_export(moved), restore(moved)
    ours, theirs = (trainers_latents(one, told, noise(distillation)) for one in (distillation, again))
    assert (theirs - ours).abs().max() <= 1e-6 * ours.abs().max().clamp(min=1)
    assert again.strategy == distillation.strategy and again.family.shape == distillation.family.shape
    if again.known is None:
        assert again.counts == distillation.counts


def test_a_run_is_its_checkpoint_and_not_its_export(exported_eps):
    with pytest.raises(UserError, match="no checkpoint yet"):
        restore(exported_eps[1])


@pytest.mark.long
def test_a_fused_pipeline_holds_the_student_too(made, tmp_path):
    distillation, _ = made["lcm-eps"]
    write_export(distillation, tmp_path / "fused", ("fused",))
    again = restore(tmp_path / "fused")
    told = read_export(tmp_path / "fused")
    ours, theirs = (trainers_latents(one, told, noise(distillation)) for one in (distillation, again))
    assert (theirs - ours).abs().max() <= 1e-4 and again.recipe.lora is None


def test_students_who_share_out_experts_keep_to_the_sidecars_steps(made):
    """Of each there is only the expert that it plays in these."""
    again = restore(made["phased-wan-whole"][1])
    told = read_export(made["phased-wan-whole"][1])
    assert again.known == tuple(told.samplers) == (2, 4) and again.counts == [4, 2] and len(again.inference().hops) == 4
    with pytest.raises(UserError, match="is sampled in one of 2, 4 steps, not in 6"):
        again.inference(6)


def test_what_is_published_names_no_folder(tmp_path):
    recipe = student(tmp_path, "eps", f"data.cache={tmp_path}/cache", "train.steps=7").recipe
    tree = published(recipe)
    assert str(tmp_path) not in json.dumps(tree) and tree["data"]["prompts"] == "prompts.txt"
    assert tree["data"]["images"] == "stepdistill/tiny" and tree["train"]["steps"] == 7
    assert tree.keys() == to_tree(recipe).keys() - {"name", "model"}
    assert str(tmp_path) in json.dumps(to_tree(recipe))  # it was left as it is


@pytest.mark.long
def test_the_recipe_survives(made):
    """All of it but the folders of data."""
    distillation, out = made["lcm-over-a-style"]
    again, given = restore(out).recipe, to_tree(distillation.recipe)
    kept = to_tree(again)
    for tree in (given, kept):
        tree["data"].pop("prompts")
    lora = given["model"].pop("loras")[0]
    assert kept["model"].pop("loras") == [lora] and kept == given
    assert recipe_hash(again) != read_export(out).recipe_hash  # that is of the recipe with its folders


def spoil(out, change):
    file = out / "stepdistill.json"
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))


def lose_a_layer(out):
    state = load_file(out / LORA)
    save_file({key: x for key, x in state.items() if key != next(iter(state))}, out / LORA)


def keep_a_row(out):
    """Which `copy_` would write into every row."""
    state = load_file(out / LORA)
    key = next(key for key in state if key.endswith("lora_A.weight"))
    save_file(state | {key: state[key][:1].contiguous()}, out / LORA)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (keep_a_row, "do not agree about the shape of .*lora_A"),
        (lambda out: spoil(out, lambda tree: tree["files"].pop("diffusers")), "kohya files alone.*--formats diffusers"),
        (lambda out: spoil(out, lambda tree: tree.update(format=4)), "another version of stepdistill; export the run again"),
        (lambda out: spoil(out, lambda tree: tree["recipe"].update(trust_remote_code=True)), "code of another package"),
        (
            lambda out: spoil(out, lambda tree: tree["recipe"]["train"].update(stepz=1)),
            r"json.*train.stepz: unknown",
        ),
        (lambda out: spoil(out, lambda tree: tree["recipe"]["lora"].update(targets=["to_q"])), "do not agree about"),
        (lose_a_layer, "do not agree about .*lora_A"),
    ],
)
def test_exports_that_cannot_be_restored(made, change, told, tmp_path):
    moved = shutil.copytree(made["lcm-eps"][1], tmp_path / "elsewhere")
    change(moved)
    with pytest.raises(UserError, match=told):
        restore(moved)


def test_students_with_other_weights_are_others(made):
    """So that the comparison above can fail."""
    distillation, out = made["lcm-eps"]
    again = restore(out)
    with torch.no_grad():
        next(iter(again.students()["student"].parameters())).add_(1.0)
    ours, theirs = (trainers_latents(one, read_export(out), noise(distillation)) for one in (distillation, again))
    assert (theirs - ours).abs().max() > 1e-3 and len(ours) == len(PROMPTS)
