"""Making teacher pairs: they are the stock pipeline's, however the job was cut up; and what a recipe says of them."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from diffusers import DDIMScheduler
from processes import world
from students import student
from written import only, swapped, write

from stepdistill import pairs
from stepdistill.assemble import assemble
from stepdistill.cli import main
from stepdistill.data import build_batches
from stepdistill.data.pairs import manifest, read_pairs
from stepdistill.data.texts import encode_texts
from stepdistill.errors import UserError
from stepdistill.export import write_export
from stepdistill.families.load import load_pipeline_folder
from stepdistill.pairs import make_pairs
from stepdistill.recipe import dump_recipe, load_recipe
from stepdistill.runs import train
from stepdistill.sampling import sample
from stepdistill.show import Line
from stepdistill.sidecar import read_export
from stepdistill.sources import PAIRS
from stepdistill.strategies import STRATEGIES

QUICK = (
    "pairs.count=7",
    "pairs.shard=3",
    "pairs.batch=2",
    "pairs.steps=4",
    "train.batch=4",
    "eval={every: 0, n: 0, steps: [1]}",
)


def distillation(folder, *overrides, teacher="eps"):
    return student(folder, teacher, *QUICK, *overrides, strategy="{name: dmd, guidance: 2.0}")


def changed(made, section="pairs", **settings):
    """The same with other keys of a section."""
    section = {section: dataclasses.replace(getattr(made.recipe, section), **settings)}
    return dataclasses.replace(made, recipe=dataclasses.replace(made.recipe, **section))


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Interrupting(Line):
    """A line that stops the job once so many pairs are made."""

    def __init__(self, after: int):
        super().__init__()
        self.after = after

    def __call__(self, text, final=False):
        super().__call__(text, final)
        if int(text.split(":")[1].split("/")[0]) >= self.after:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return distillation(tmp_path_factory.mktemp("pairs"))


@pytest.mark.parametrize("teacher", ["eps", "flow"])
def test_pairs_are_what_the_stock_pipeline_makes_of_the_noise(tmp_path, teacher):
    ours, given = distillation(tmp_path, teacher=teacher), {}
    pipe = load_pipeline_folder(ours.recipe.model.source, torch.float32)
    if teacher == "flow":
        given = {"sigmas": [1.0, 0.75, 0.5, 0.25]}
    else:  # our walk ends at the clean sample
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True)
    for guidance in (1.0, 3.0):
        make_pairs(changed(ours, guidance=guidance), tmp_path / f"pairs{guidance}", Line())
        prompts, noise, x0 = read_pairs(tmp_path / f"pairs{guidance}")
        given |= {"latents": noise, "num_inference_steps": 4, "guidance_scale": guidance, "output_type": "latent"}
        torch.testing.assert_close(x0, pipe(prompts, **given).images, rtol=1e-4, atol=1e-4)
    assert prompts[:3] == [prompts[0], prompts[1], prompts[0]] and prompts[0] != prompts[1]  # two prompts, again and again


def test_an_interrupted_job_ends_as_an_unbroken_one(made, tmp_path, capsys):
    make_pairs(made, tmp_path / "whole", Line())
    with pytest.raises(KeyboardInterrupt):
        make_pairs(made, tmp_path / "broken", Interrupting(after=5))
    assert "stopped with 1 of 3 files" in capsys.readouterr().err
    first = tmp_path / "broken" / "pairs-00000.safetensors"
    before = first.stat().st_mtime_ns
    assert sorted(files(tmp_path / "broken")) == ["pairs-00000.safetensors", PAIRS]
    make_pairs(made, tmp_path / "broken", Line())
    assert files(tmp_path / "broken") == files(tmp_path / "whole") and first.stat().st_mtime_ns == before
    said = capsys.readouterr().err
    assert "pairs: 7/7" in said and "pairs: 3/7" not in said


def test_batches_and_files_change_no_pair_and_the_seed_changes_all(made, tmp_path):
    read = {}
    for name, some in {"one": {}, "batches": {"batch": 3}, "files": {"shard": 7}, "seed": {"seed": 1}}.items():
        make_pairs(changed(made, **some), tmp_path / name, Line())
        read[name] = read_pairs(tmp_path / name)
    for name in ("batches", "files"):
        assert torch.equal(read[name][1], read["one"][1])
        torch.testing.assert_close(read[name][2], read["one"][2], rtol=1e-4, atol=1e-5)
    assert not (read["seed"][1] == read["one"][1]).any()


def make_share(recipe, folder):
    """One of several processes: the files that it wrote."""
    wrote, write_shard = [], pairs.write_shard
    pairs.write_shard = lambda path, *rest: wrote.append(path.name) or write_shard(path, *rest)
    make_pairs(assemble(recipe), folder, Line())
    return wrote


def test_two_processes_make_what_one_makes(made, tmp_path):
    make_pairs(made, tmp_path / "one", Line())
    wrote = world(2, make_share, made.recipe, tmp_path / "two")
    assert wrote == [["pairs-00000.safetensors", "pairs-00002.safetensors"], ["pairs-00001.safetensors"]]
    assert files(tmp_path / "two") == files(tmp_path / "one")


@pytest.fixture(params=[("eps", 4), ("flow", 1)])  # on flow a fused scheduler's grid is the student's in one step only
def rectified(tmp_path, request):
    """A student of so many steps, and the recipe that has it for a teacher."""
    teacher, steps = request.param
    made = student(tmp_path, teacher, *QUICK, strategy=f"{{name: reflow, steps: {steps}}}")
    write_export(made, tmp_path / "run" / "export", ("fused",))
    source = tmp_path / "run" / "export" / "fused"
    again = ("name=again", f"model.source={source}", "strategy.guidance=1", f"pairs.steps={steps}")
    return made, load_recipe(tmp_path / "run" / "recipe.yaml", again)


def test_a_fused_student_makes_pairs_as_a_teacher(rectified, tmp_path):
    made, again = rectified
    make_pairs(assemble(again), tmp_path / "pairs", Line())
    prompts, noise, x0 = read_pairs(tmp_path / "pairs")
    ours = sample(made.students(), made.inference(), noise, encode_texts(made.family, prompts))
    torch.testing.assert_close(x0, ours, rtol=1e-4, atol=1e-4)
    teachers = made.roles.swap(student=made.roles.teacher)
    assert (sample(teachers, made.inference(), noise, encode_texts(made.family, prompts)) - x0).abs().max() > 1e-2


@pytest.mark.long
def test_a_fused_student_is_rectified_again(rectified, tmp_path):
    """Pairs, training and export, whose own check is that stock diffusers draws what this student draws on that base."""
    run = train(rectified[1], tmp_path / "again")
    told = read_export(run.export)
    assert run.step == 1 and told.base == rectified[1].model.source and told.steps == rectified[1].strategy.steps
    assert manifest(run.folder / "pairs")["guidance"] == 1


def test_other_settings_go_to_another_folder(made, tmp_path):
    make_pairs(made, tmp_path / "pairs", Line())
    with pytest.raises(UserError, match=r"guidance was 2\.0 and is now 3\.0"):
        make_pairs(changed(made, guidance=3.0), tmp_path / "pairs", Line())
    with pytest.raises(UserError, match=r"prompts was .* set them back, or name another folder"):
        make_pairs(changed(made, "data", count=1), tmp_path / "pairs", Line())


def test_strategies_that_need_pairs_say_how_the_teacher_is_guided():
    needing = [kind() for kind in STRATEGIES.values() if "pairs" in kind().needs]
    assert needing and all(isinstance(strategy.guidance, float) for strategy in needing)


@pytest.fixture
def recipe_file(tmp_path, monkeypatch):
    made = distillation(tmp_path, "train.steps=2", "train.save_every=2")
    (tmp_path / "run" / "recipe.yaml").write_text(dump_recipe(made.recipe))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run" / "recipe.yaml"


def test_training_makes_its_pairs_first_and_a_finished_run_does_without_them(recipe_file, tmp_path, monkeypatch, capsys):
    file = str(recipe_file)
    with monkeypatch.context() as stopped:
        stopped.setattr("stepdistill.runs.Line", lambda: Interrupting(after=4))
        assert main(["train", file]) == 130
    assert list(tmp_path.glob("runs/tiny/pairs/*.safetensors")) == [tmp_path / "runs/tiny/pairs/pairs-00000.safetensors"]
    assert "The same command goes on from there" in capsys.readouterr().err
    run = train(load_recipe(file))
    assert run.step == 2 and main(["pairs", file, "--out", "elsewhere"]) == 0
    assert files(run.folder / "pairs") == files(tmp_path / "elsewhere")
    shutil.rmtree(run.folder / "pairs")
    assert main(["export", str(run.folder), "--formats", "diffusers"]) == 0


def test_pairs_verb_makes_completes_and_tells_how_to_go_on(recipe_file, tmp_path, monkeypatch, capsys):
    file = str(recipe_file)
    with monkeypatch.context() as stopped:
        stopped.setattr("stepdistill.pairs.Line", lambda: Interrupting(after=4))
        assert main(["pairs", file, "--out", "mine"]) == 130
    assert main(["validate", file, "pairs.folder=mine"]) == 0  # only the form
    assert main(["train", file, "pairs.folder=mine", "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert "pairs.folder: mine lacks pairs-00001.safetensors and 1 more; complete it: stepdistill pairs RECIPE" in said
    assert main(["pairs", file, "pairs.folder=mine"]) == 0  # though the recipe names what is not complete
    assert capsys.readouterr().out == f"mine is complete; then: stepdistill train {file} pairs.folder=mine\n"
    assert main(["train", file, "pairs.folder=mine", "--dry-run"]) == 0
    assert main(["pairs", file]) == 0 and files(tmp_path / "pairs" / "tiny") == files(tmp_path / "mine")
    assert main(["pairs", file, "strategy={name: vsd}"]) == 2
    assert "strategy vsd needs no pairs" in capsys.readouterr().err


def test_pairs_of_another_resolution_are_refused(made, tmp_path):
    make_pairs(made, tmp_path / "pairs", Line())
    assert build_batches(made.recipe, made.family, pairs=tmp_path / "pairs").shape == (4, 8, 8)
    larger = type(made.family)(made.family.pipe, (32, 32))
    with pytest.raises(
        UserError, match=r"shape \[4, 8, 8\], but at 32 x 32 pixels they are \[4, 16, 16\]; set data.resolution"
    ):
        build_batches(made.recipe, larger, pairs=tmp_path / "pairs")


DMD = swapped("name: lcm\n  guidance: [2.0, 6.0]", "name: dmd")


def test_a_named_folder_must_have_the_pairs_of_this_teacher(root):
    file, folder = write(root, DMD), root / "pairs"
    assert load_recipe(file).pairs.folder is None
    assert only(file, f"pairs.folder={folder}").startswith("command line  pairs.folder: ")
    assert f"{folder} holds no teacher pairs: it has no pairs.json" in only(file, f"pairs.folder={folder}")
    assert load_recipe(file, [f"pairs.folder={folder}"], data=False).pairs.folder == str(folder)  # sampling does without
    folder.mkdir()
    manifest = {"source": str(root / "teacher"), "revision": None, "variant": "fp16", "count": 1, "shard": 2}
    (folder / PAIRS).write_text(json.dumps(manifest))
    (folder / "pairs-00000.safetensors").touch()
    assert "another teacher (variant fp16, not None)" in only(file, f"pairs.folder={folder}")
    (folder / PAIRS).write_text(json.dumps(manifest | {"variant": None}))
    assert load_recipe(file, [f"pairs.folder={folder}"]).pairs.folder == str(folder)
    for damaged in ("{", "{}", "[]"):
        (folder / PAIRS).write_text(damaged)
        assert "pairs.json cannot be read" in only(file, f"pairs.folder={folder}")
    assert load_recipe(write(root), [f"pairs.folder={folder}"]).pairs.count == 2048  # lcm needs none


def test_recipes_that_know_no_pairs_still_load(root):
    old = dump_recipe(load_recipe(write(root)))
    without = old[: old.index("pairs:")] + old[old.index("optim:") :]
    assert load_recipe(write(root, without)) == load_recipe(write(root, old))
