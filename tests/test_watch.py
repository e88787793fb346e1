"""What is wrong with finite numbers: losses that explode, and figures that leave a range."""

from __future__ import annotations

import json
import math
import random

import pytest
from students import student

from stepdistill.data import build_batches
from stepdistill.errors import Exploded
from stepdistill.recipe import load_recipe
from stepdistill.strategies import LCM
from stepdistill.trainer import Trainer
from stepdistill.watch import ENOUGH, KNOBS, RECENT, Range, Watch, advice, left


def fed(watch, sizes):
    """The number of the first loss at which a watch says that it exploded; None: never."""
    for n, size in enumerate(sizes):
        if watch({"student": size}):
            return n
    return None


def noisy(n, seed=0):
    """Losses of a healthy training: of size 1, spread over a factor of ten."""
    generator = random.Random(seed)
    return [math.exp(generator.gauss(0, 0.7)) for _ in range(n)]


@pytest.mark.parametrize("sign", [1, -1])
def test_an_explosion_is_told_after_several_iterations_with_its_sizes(sign):
    watch = Watch(1000)
    losses = [sign * loss for loss in [*noisy(100), *[5000.0] * 20]]
    assert fed(watch, losses) == 100 + RECENT // 2 - 1  # when half of the last ones are
    who, usual, now = watch({"student": sign * 6000.0})
    assert who == "student" and 0.7 < usual < 1.4 and now == 5000


@pytest.mark.parametrize(
    "losses",
    [
        pytest.param([*noisy(100), *[1e9] * 4, *noisy(100)], id="a few wild batches"),
        pytest.param([*noisy(100), *[500.0] * 400], id="below the factor"),
        pytest.param([math.sin(n / 20) for n in range(2000)], id="crosses zero"),
        pytest.param([-math.log(1 + n) for n in range(2000)], id="ever more negative"),
        pytest.param([1e-12] * 100 + [0.9] * 100, id="begins at nothing"),
        pytest.param([*[1.0] * (ENOUGH - 1), *[1e9] * 10], id="too early to say"),
        pytest.param([10 ** (n / 1000) for n in range(5000)], id="another scale, slowly"),
    ],
)
def test_what_is_no_explosion(losses):
    assert fed(Watch(1000), losses) is None


def test_players_are_watched_alone_a_new_stage_is_new_and_nobody_may_be_watched():
    watch = Watch(10)
    for size in [1.0] * 80:
        assert watch({"student": size, "critic": 1000 * size}) is None
    assert [watch({"critic": 1000.0, "student": 100.0}) for _ in range(RECENT)][-1][0] == "student"
    watch.forget()
    assert fed(watch, [100.0] * 200) is None
    assert fed(Watch(None), [*[1.0] * 100, *[1e30] * 100]) is None


def test_a_watch_goes_on_from_plain_json_as_if_it_had_not_stopped():
    losses = [*noisy(300), *[1e5] * RECENT]
    whole = Watch(1000)
    expected = [whole({"student": loss}) for loss in losses]
    first, second = Watch(1000), Watch(1000)
    told = [first({"student": loss}) for loss in losses[:303]]
    second.load(json.loads(json.dumps(first.state())))
    assert told + [second({"student": loss}) for loss in losses[303:]] == expected and expected[-1]


def test_a_range_is_the_mean_and_the_spread_from_picture_to_picture():
    teacher = {"saturation": Range.of([1.0, 2.0, 3.0]), "diversity": Range.of([5.0, 5.0])}
    assert teacher["saturation"] == Range(2.0, 1.0)
    assert left(teacher, {"saturation": 3.0, "diversity": 5.0}) == {}
    assert left(teacher, {"saturation": 3.1, "diversity": 4.9}) == {"saturation": "high", "diversity": "low"}
    assert left(teacher, {"saturation": 0.9}) == {"saturation": "low"}


@pytest.mark.parametrize(
    ("name", "side", "values", "told"),
    [
        ("saturation", "high", {"strategy.guidance": 7.5}, ["lower strategy.guidance, which is 7.5"]),
        ("saturation", "high", {"strategy.guidance": [2.0, 6.0]}, ["lower strategy.guidance, which is [2, 6]"]),
        (
            "saturation",
            "high",
            {"strategy.guidance": 1.0, "optim.student_lr": 1e-4},
            ["lower optim.student_lr, which is 0.0001"],
        ),
        ("contrast", "high", {"train.ema": None}, ["set train.ema, as to 0.99"]),
        ("contrast", "high", {"train.ema": 0.9}, []),
        (
            *("diversity", "low", {"strategy.student_every": 1, "strategy.gan": 0.0, "strategy.guidance": 3.0}),
            ["raise strategy.student_every, which is 1", "lower strategy.guidance, which is 3"],
        ),
        ("diversity", "low", {"strategy.gan": 0.01}, ["lower strategy.gan, which is 0.01"]),
    ],
)
def test_advice_names_keys_that_the_recipe_has_and_that_can_be_turned(name, side, values, told):
    assert list(advice(name, side, values)) == told


def test_every_side_has_advice_that_fits_any_recipe():
    for name, side in KNOBS:
        assert list(advice(name, side, {"optim.student_lr": 1e-4}))


def test_a_training_that_explodes_ends_and_resumes_to_the_same_end(tmp_path, monkeypatch):
    monkeypatch.setattr("stepdistill.watch.ENOUGH", 4)
    monkeypatch.setattr("stepdistill.watch.RECENT", 3)
    made = student(tmp_path, "eps", "data.count=2", "train.batch=1", "train.steps=12", "train.explosion=100")
    honest = LCM.losses

    def losses(self, roles, batch, draw):
        for who, loss, logs in honest(self, roles, batch, draw):
            yield who, loss * (1e6 if draw.step >= 8 else 1), logs

    monkeypatch.setattr(LCM, "losses", losses)
    data = build_batches(made.recipe, made.family)
    first, second = Trainer(made, data), Trainer(made, data)
    for _ in range(7):
        first.step()
    second.load(first.save(tmp_path / "checkpoints"))
    second.step()
    second.step()
    with pytest.raises(Exploded, match=r"by step 10: losses of player student are of size .*optim\.student_lr") as caught:
        second.step()
    assert caught.value.size > 100 * caught.value.usual


def test_explosion_must_be_a_factor(tmp_path):
    student(tmp_path)
    with pytest.raises(ValueError, match=r"train\.explosion"):
        load_recipe(tmp_path / "run" / "recipe.yaml", ["train.explosion=1"])
    assert load_recipe(tmp_path / "run" / "recipe.yaml", ["train.explosion=null"]).train.explosion is None
