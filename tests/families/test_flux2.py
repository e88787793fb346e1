"""FLUX.2: its shift, which depends on the number of steps, and the guidance that dev is told and klein may have."""

import pipelines
import pytest
import torch
from parts import flow
from pipelines import PROMPTS, watch

from stepdistill.families import Flux2, Flux2Klein
from stepdistill.schedules import RectifiedFlow


def test_schedule_has_the_shift_of_the_pipeline_s_own_number_of_steps():
    pipe = pipelines.flux2(klein=True)
    family = Flux2Klein(pipe, (32, 32))
    _, seen = watch(pipe, PROMPTS[:1], height=32, width=32, num_inference_steps=50)
    times = [k.item() / 1000 for _, k, _ in seen]
    assert times == pytest.approx(family.schedule.grid(50)[:0:-1], abs=1e-6)
    assert family.schedule.shift != Flux2Klein(pipe, (16, 16)).schedule.shift


def test_a_fixed_shift_stays():
    pipe = pipelines.flux2()
    pipe.scheduler = flow(shift=2.0)
    assert Flux2(pipe).schedule == RectifiedFlow(shift=2.0)


def test_each_sample_may_be_told_its_own_guidance():
    family = Flux2(pipelines.flux2(), (16, 16))
    cond, x_t, t = family.encode_prompts(PROMPTS[:2]), torch.randn(2, *family.shape), torch.full([2], 0.5)
    together = family.forward(family.net, x_t, t, cond | {"guidance": torch.tensor([1.5, family.sampler_guidance])})
    plain = family.forward(family.net, x_t, t, cond)
    assert family.sampler_guidance == 4.0 and torch.allclose(together[1], plain[1], rtol=0, atol=1e-5)
    assert (together[0] - plain[0]).abs().max() > 1e-4


def test_klein_s_guidance_is_distilled_where_its_pipeline_says_so():
    found = [Flux2Klein(pipelines.flux2(klein=True, distilled=distilled)) for distilled in (False, True)]
    assert [family.guidance_distilled for family in found] == [False, True] and found[1].null_prompts() is None
