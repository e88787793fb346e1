"""Walks of teacher and student, and pictures keyed by index."""

import numpy as np
import pytest
import torch
from students import student

from stepdistill.evaluate.grid import draw_grid
from stepdistill.evaluate.walks import SOLVERS, new_solver, sampler, student_walk, teacher_walk
from stepdistill.sampling import Inference, trailing

PROMPTS = ["a large red ring", "a small blue bar", "a cross"]


def latents(distillation, walk):
    family = distillation.family
    shape = family.shape
    noise = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    null = {name: x.expand(3, *x.shape[1:]) for name, x in family.null_prompts().items()}
    return walk(noise, family.encode_prompts(PROMPTS), null, torch.randn_like)


@pytest.mark.parametrize("teacher", ["eps", "v", "shift1"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_stock_first_order_solver_walks_as_our_own_hops_do(tmp_path, teacher, scale):
    made = student(tmp_path, teacher)
    hops = trailing(made.roles.schedule.grid(4), "teacher", scale)
    ours = latents(made, student_walk(made, Inference(hops, renoise=False)))
    stock = latents(made, teacher_walk(made, "first order", 4, scale))
    # DDIM ends at the table's first entry, or at none, as the scheduler's set_alpha_to_one says; ours at the clean sample
    tolerance = 1e-5 if teacher == "shift1" else 0.05
    torch.testing.assert_close(stock, ours, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("teacher", ["v", "shift1"])
def test_every_solver_comes_to_the_same_place_with_many_steps(tmp_path, teacher):
    made = student(tmp_path, teacher)
    truth = latents(made, teacher_walk(made, "first order", 120, 1.0))
    for solver in SOLVERS:
        far, near = (latents(made, teacher_walk(made, solver, steps, 1.0)) for steps in (2, 30))
        assert (near - truth).norm() < 0.5 * (far - truth).norm(), solver


def test_unknown_solver_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not one of first order"):
        new_solver("heun", student(tmp_path), 4)


def test_pictures_depend_on_their_index_alone(tmp_path):
    made = student(tmp_path)
    walk = student_walk(made, made.inference(2))
    whole = sampler(made, walk)(PROMPTS, 5)
    assert whole.dtype == np.uint8 and whole.shape[0] == 3
    parts = [sampler(made, walk, batch=1)(PROMPTS[:1], 5), sampler(made, walk, batch=2)(PROMPTS[1:], 6)]
    assert np.abs(np.concatenate(parts).astype(int) - whole).max() <= 1
    assert (sampler(made, walk)(PROMPTS, 6) != whole).any()


def test_a_grid_has_a_row_for_each_label():
    pictures = np.zeros((3, 8, 8, 3), np.uint8)
    one, two = (draw_grid([("teacher\n4 steps", pictures)] * n, PROMPTS) for n in (1, 2))
    assert one.width == two.width and two.height > one.height
