"""What a loaded recipe says of itself."""

import pytest
from students import student

from stepdistill.errors import UserError


@pytest.mark.parametrize(
    ("strategy", "overrides", "counts"),
    [
        ("{name: lcm}", [], [4, 2, 1]),
        ("{name: lcm, steps: 8}", [], [8, 4, 2, 1]),
        ("{name: dmd2, steps: 3}", [], [3, 1]),
        ("{name: vsd}", [], [1]),
        ("{name: boot}", [], [1]),
        ("{name: phased_dmd, phase_steps: 1}", ["train.steps=2"], [4, 2]),
        ("{name: tscd, segments: [2], mix: [0.0], steps: 2}", [], [2]),
        ("{name: lcm}", ["eval.steps=[1, 6]"], [6, 1]),
    ],
)
def test_numbers_of_steps_in_which_a_student_is_shown(tmp_path, strategy, overrides, counts):
    assert student(tmp_path, "eps", *overrides, strategy=strategy).counts == counts


def test_a_number_of_steps_that_cannot_be(tmp_path):
    with pytest.raises(UserError, match="a VSD student takes one step, not 4"):
        student(tmp_path, strategy="{name: vsd}").inference(4)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["data.resolution=[16, 17]"], "16 x 17: height and width of a StableDiffusionPipeline must be multiples of 2; "),
        (
            ["data.resolution=[16, 24]", "data.frames=5"],
            "data.frames 5: a StableDiffusionPipeline makes pictures; leave it out",
        ),
    ],
)
def test_a_size_that_cannot_be(tmp_path, overrides, told):
    with pytest.raises(UserError, match=told):
        student(tmp_path, "eps", *overrides)


def test_another_size(tmp_path):
    made = student(tmp_path, "eps", "data.resolution=[16, 24]")
    assert made.family.size == (16, 24) and made.family.shape == (4, 8, 12)
