"""Recipes: all mistakes are told at once, with file, line, value, rule and remedy; the rest survives a round trip."""

from pathlib import Path

import pytest
from written import GOOD, only, problems, swapped, write

from stepdistill.errors import UserError
from stepdistill.listing import shipped
from stepdistill.recipe import differences, dump_recipe, load_recipe
from stepdistill.sections import Lora
from stepdistill.strategies import STRATEGIES

NAMES = ", ".join(STRATEGIES)


def test_good_recipe(root):
    recipe = load_recipe(write(root))
    assert recipe.name == "my"
    assert (recipe.lora.rank, recipe.lora.targets, recipe.train.steps, recipe.eval.every) == (16, None, 300, 0)
    assert type(recipe.strategy) is STRATEGIES["lcm"]
    assert recipe.strategy.guidance == (2.0, 6.0)


def test_scientific_notation_is_a_number(root):
    assert load_recipe(write(root)).optim.student_lr == 5e-5  # PyYAML alone reads the text "5e-5"
    recipe = load_recipe(write(root), ["optim.critic_lr=1e-3", "train.steps=1e3"])
    assert (recipe.optim.critic_lr, recipe.train.steps) == (1e-3, 1000)
    assert isinstance(recipe.train.steps, int)


def test_yaml_no_is_the_precision_no(root):
    recipe = load_recipe(write(root, GOOD + "name: n\n"), ["train.precision=no"])  # PyYAML alone reads False
    assert recipe.train.precision == "no"
    assert load_recipe(write(root, dump_recipe(recipe))) == recipe


def test_steps_that_the_student_cannot_take(root):
    told = problems(write(root), "strategy={name: dmd2, steps: 2}", "eval.steps=[2, 3, 1]")
    assert len(told) == 1 and "eval.steps: 3 cannot be: a DMD2 student of 2 steps cannot take 3" in told[0]


def test_a_training_that_ends_before_its_last_stage(root):
    told = problems(write(root), "strategy={name: phased_dmd, phase_steps: 300}", "train.steps=300")
    assert len(told) == 1 and "train.steps: 300 end in stage 1 of 2 of phased_dmd" in told[0]
    assert load_recipe(write(root), ["strategy={name: phased_dmd, phase_steps: 300}", "train.steps=301"])


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("rank: 16", "rnak: 16", 4, "lora.rnak: unknown key; did you mean 'rank'?"),
        ("steps: 300", "steps: 300\n  student_lr: 1", 15, "unknown key; did you mean 'optim.student_lr'?"),
        ("guidance:", "guidence:", 7, "did you mean 'guidance'? (see: stepdistill explain lcm)"),
        ("optim:", "otpim:", 11, "otpim: unknown key; did you mean 'optim'?"),
        ("name: lcm", "name: lmc", 6, "unknown strategy lmc; did you mean 'lcm'?"),
        ("name: lcm", "name: zzz", 6, f"unknown strategy zzz; there are {NAMES}"),
        ("rank: 16", "rank: sixteen", 4, "lora.rank: sixteen must be a whole number"),
        ("rank: 16", "rank: 16.5", 4, "lora.rank: 16.5 must be a whole number"),
        ("rank: 16", "rank: true", 4, "lora.rank: true must be a whole number"),
        ("rank: 16", "rank:", 4, "lora.rank: null must be a whole number"),
        ("rank: 16", "targets: to_q", 4, "lora.targets: to_q must be null or a list, each text"),
        ("rank: 16", "targets: []", 4, "lora.targets: [] leaves nothing to train"),
        ("guidance: [2.0, 6.0]", "guidance: [2.0]", 7, "[2.0] must be a list of 2, each a number"),
        ("guidance: [2.0, 6.0]", "guidance: 3", 7, "guidance: 3 must be a list of 2"),
        ("guidance: [2.0, 6.0]", "guidance: [6.0, 2.0]", 7, "write the smaller scale first"),
        ("guidance: [2.0, 6.0]", "guidance: [0.5, 2]", 7, "[0.5, 2] is out of range; it must be at least 1"),
        ("{root}/teacher", "{root}/teacher\n  quantize: int4", 3, "model.quantize: int4 must be null or one of int8, nf4"),
        ("rank: 16", "rank: 0", 4, "lora.rank: 0 is out of range; it must be at least 1 and at most 1024"),
        ("rank: 16", "rank: 2000", 4, "lora.rank: 2000 is out of range"),
        ("5e-5", "0", 12, "optim.student_lr: 0 is out of range; it must be above 0 and at most 1"),
        ("5e-5", ".nan", 12, "optim.student_lr: .nan must be a number"),
        ("5e-5", "5e-5\n  betas: [0.9, 1.0]", 13, "optim.betas: [0.9, 1.0] is out of range; it must be at least 0 and"),
        ("5e-5", "5e-5\n  schedule: cosin", 13, "cosin must be one of constant, cosine"),
        ("batch: 32", "accumulate: 3", 15, "train.accumulate: 3 must divide train.batch, which is 16"),
        ("batch: 32", "precision: fp16", 15, "train.precision: fp16 is refused: training in fp16 diverges"),
        ("batch: 32", "precision: fp16", 15, "use bf16"),
        ("batch: 32", "ema: 1", 15, "train.ema: 1 is out of range; it must be above 0 and below 1"),
        ("every: 0", "steps: []", 17, "eval.steps: [] must name at least one"),
        ("steps: 300\n", "\n", 13, "train.steps: is missing; add train.steps, a whole number"),
        ("  name: lcm\n", "", 5, f"strategy.name: is missing; name one of {NAMES}"),
        ("rank: 16", "rank: 16\n  rank: 8", 5, "lora.rank: occurs twice, first in line 4; keep one"),
        ("lora:\n  rank: 16", "lora: 16", 3, "lora: 16 must be a section of keys"),
        ("every: 0", "every: 0\nname: a/b", 18, "name: a/b must be letters, digits"),
        ("every: 0", "every: 0\nname: my_scheduler", 18, "diffusers skips such files"),
        ("  guidance: [2.0, 6.0]", "  embed_guidance: 3.0", 7, "set lora: null"),
    ],
)
def test_bad_value_is_told_with_its_line(root, old, new, line, said):
    file = write(root, swapped(old, new))
    found = [text for text in problems(file) if said in text]
    assert len(found) == 1, problems(file)
    assert found[0].startswith(f"{file}:{line}  ")


def test_everything_is_told_at_once_in_the_order_of_lines(root):
    text = swapped("rank: 16", "rank: 0").replace("name: lcm", "name: dmd3").replace("steps: 300", "stepz: 300")
    (root / "prompts.txt").write_text("")
    found = problems(write(root, text), "optim.clip=-1", "foo=1")
    wanted = ["lora.rank", "strategy.name", "data.prompts", "train.steps", "train.stepz", "optim.clip", "foo"]
    assert [text.split("  ")[1].split(":")[0] for text in found] == wanted
    lines = [int(text.split("my.yaml:")[1].split()[0]) for text in found[:5]]
    assert lines == sorted(lines)
    assert all(text.startswith("command line  ") for text in found[5:])


def test_a_problem_in_a_section_hides_no_other_of_that_section(root):
    text = swapped("{root}/teacher", "{root}/nowhere\n  dtype: int8").replace("batch: 32", "accumulate: 5\n  keep: 0")
    found = problems(write(root, text))
    assert len(found) == 4
    for words in ("nowhere does not exist", "int8 must be", "must divide", "keep: 0 is out"):
        assert any(words in text for text in found), words


def test_overrides(root):
    file = write(root)
    recipe = load_recipe(file, ["lora.rank=8", "strategy.guidance=[3, 4]", "eval.prompts=['a, b', c]", "data.count=5"])
    assert (recipe.lora.rank, recipe.strategy.guidance, recipe.data.count) == (8, (3.0, 4.0), 5)
    assert recipe.eval.prompts == ["a, b", "c"]
    assert load_recipe(file, ["lora=null"]).lora is None
    assert load_recipe(file, ["lora=null", "lora.rank=4"]).lora == Lora(rank=4)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.stepz=5", "train.stepz: unknown key; did you mean 'steps'?"),
        ("trian.steps=5", "trian: unknown key; did you mean 'train'?"),
        ("train.steps=0", "train.steps: 0 is out of range; it must be at least 1"),
        ("train.steps", "train.steps: an override reads key=value"),
        ("train..x=1", "an override reads key=value"),
        ("eval.prompts=[a", "is not a YAML value"),
        ("train.steps.x=1", "train.steps: {x: 1} must be a whole number"),
        ("strategy.guidnce=[1, 2]", "did you mean 'guidance'?"),
        ("lora={1: 2}", "lora.1: unknown key; there are rank, targets"),
        ("lora={rank: 2, rank: 3}", "lora.rank: occurs twice; keep one"),
    ],
)
def test_bad_override(root, override, said):
    text = only(write(root), override)
    assert text.startswith("command line  ")
    assert said in text


def test_full_copies_and_the_told_guidance(root):
    recipe = load_recipe(write(root, swapped("lora:\n  rank: 16", "lora: null")), ["strategy.embed_guidance=3"])
    assert recipe.lora is None
    assert recipe.strategy.embed_guidance == 3


def test_strategy_that_needs_pictures(root):
    file = write(root, swapped("  images: {root}/pictures\n", ""))
    text = only(file)
    assert text.startswith(f"{file}:8  data.images: null, but strategy lcm learns from pictures; give a folder")
    assert load_recipe(file, ["strategy={name: dmd2}"]).data.images is None
    assert "strategy dmd2 learns from pictures" in only(file, "strategy={name: dmd2, gan: 1e-3}")


def test_yaml_that_is_none(root):
    assert f"{root}/my.yaml:2  this is not valid YAML" in only(write(root, "model: [1\nlora: 3\n"))
    assert "is no recipe" in only(write(root, "- a\n- b\n"))
    assert ":1  " in only(write(root, "model: !!python/object/apply:os.getcwd []\n"))
    missing = [text for text in problems(write(root, "")) if "is missing" in text]
    assert len(missing) == 4  # source, prompts, steps, strategy


def test_no_such_recipe():
    with pytest.raises(UserError, match="did you mean 'quickstart'"):
        load_recipe("quikstart")
    with pytest.raises(UserError, match="neither a file"):
        load_recipe("nowhere/at/all.yaml")


def test_sampling_does_without_the_data(root):
    (root / "prompts.txt").unlink()
    file = write(root)
    problems(file)
    assert load_recipe(file, data=False).name == "my"


def test_home_folder(root, monkeypatch):
    monkeypatch.setenv("HOME", str(root))
    recipe = load_recipe(write(root, GOOD.replace("{root}", "~")))
    assert recipe.data.prompts == str(root / "prompts.txt")
    assert recipe.model.source == str(root / "teacher")


def test_round_trip_and_differences(root):
    recipe = load_recipe(write(root), ["train.ema=0.99", "lora.targets=[to_q, to_k]", "eval.prompts=['no: 1', 'ö']"])
    (root / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(root / "again.yaml") == recipe
    assert differences(recipe, recipe) == []
    other = load_recipe(root / "again.yaml", ["train.steps=9", "strategy.grid=10", "lora=null", "eval.every=3"])
    assert differences(recipe, other) == ["lora", "strategy.grid", "train.steps", "eval.every"]
    full = load_recipe(write(root), ["strategy={name: dmd2}"])
    assert "strategy.name" in differences(recipe, full)


@pytest.mark.parametrize("name", sorted(shipped()))
def test_shipped_recipes_are_in_order(name):
    recipe = load_recipe(name, there=False)  # some want pictures of one's own
    assert recipe.name == name
    assert f"stepdistill train {name}" in Path(shipped()[name]).read_text()
