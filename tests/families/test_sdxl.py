"""Stable Diffusion XL against the stock pipeline with its own scheduler, Euler on x_t / alpha."""

import pipelines
import pytest
import torch
from pipelines import PROMPTS

from stepdistill.families import FAMILIES, SDXL
from stepdistill.schedules import VariancePreserving


@pytest.fixture(scope="module")
def family():
    family = FAMILIES["StableDiffusionXLPipeline"](pipelines.sdxl())
    assert isinstance(family, SDXL) and family.kind == "eps"
    return family


def test_each_input_counts(family):
    """A family that left one of them out, or the size of the picture, would be another network."""
    cond, x_t, t = family.encode_prompts(PROMPTS), torch.randn(3, 4, 8, 8), torch.full([3], 0.5)
    whole = family.forward(family.net, x_t, t, cond)
    for name in ("text", "pooled"):
        without = family.forward(family.net, x_t, t, cond | {name: torch.zeros_like(cond[name])})
        assert (without - whole).abs().max() > 1e-4
    told = []
    handle = family.net.add_time_proj.register_forward_hook(lambda _module, args, _out: told.append(args[0]))
    family.forward(family.net, torch.randn(3, 4, 16, 12), t, cond)
    handle.remove()
    assert told[0].reshape(3, 6).tolist() == [[32, 24, 0, 0, 32, 24]] * 3


def test_a_half_precision_autoencoder_that_overflows_is_float32():
    assert SDXL(pipelines.sdxl().to(torch.float16)).pipe.vae.dtype == torch.float32
    assert SDXL(pipelines.sdxl().to(torch.bfloat16)).pipe.vae.dtype == torch.bfloat16


def test_schedule_is_read_from_euler(family):
    assert isinstance(family.schedule, VariancePreserving)
    table = family.pipe.scheduler.alphas_cumprod
    assert torch.allclose(family.schedule.theta.cos().square().float(), table, rtol=1e-6)
