"""Stable Diffusion: what the family hands to training is what the stock pipeline hands to its scheduler."""

import pipelines
import pytest
import torch
from pipelines import PROMPTS, watch

from stepdistill.families import FAMILIES, SD
from stepdistill.families.base import read_kind
from stepdistill.roles import Denoiser
from stepdistill.schedules import VariancePreserving


@pytest.fixture(scope="module", params=[("epsilon", "eps"), ("v_prediction", "v")], ids=["eps", "v"])
def family(request):
    family = FAMILIES["StableDiffusionPipeline"](pipelines.sd(request.param[0]))
    assert isinstance(family, SD) and family.kind == request.param[1]
    return family


def test_prediction_is_the_scheduler_s(family):
    """DDIM's own x0, at 4 timesteps from almost clean to the noise end."""
    x, raw = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    cond = family.encode_prompts(PROMPTS)
    family.pipe.scheduler.set_timesteps(1000)
    for k in (0, 10, 500, 999):
        p = Denoiser(family, family.net)(x, torch.full([3], k / 999), cond)
        raw = family.forward(family.net, x, torch.full([3], k / 999), cond)
        clean = family.pipe.scheduler.step(raw, k, x).pred_original_sample
        assert torch.allclose(p.x0, clean, rtol=1e-5, atol=1e-5)


def test_guidance_embedding_is_the_pipeline_s():
    """A stock network with time_cond_proj_dim is told guidance_scale - 1 and makes one forward: the scale is ours."""
    family = SD(pipelines.sd(time_cond_proj_dim=32))
    cond, scale = family.encode_prompts(PROMPTS), 7.5
    _, seen = watch(family.pipe, PROMPTS, guidance_scale=scale)
    outs = {}
    for told in (scale, 3.0):
        for out, k, x in seen:
            outs[told] = family.forward(
                family.net, x, torch.full([3], k.item() / 999), cond | {"guidance": torch.full([3], told)}
            )
            assert torch.allclose(outs[told], out, rtol=0, atol=1e-5) == (told == scale)


def test_each_sample_may_be_told_its_own_guidance():
    family = SD(pipelines.sd(time_cond_proj_dim=32))
    cond, x, t = family.encode_prompts(PROMPTS), torch.randn(3, 4, 8, 8), torch.full([3], 0.5)
    guidance = torch.tensor([2.0, 7.5, 16.0])
    together = family.forward(family.net, x, t, cond | {"guidance": guidance})
    for i in range(3):
        one = {name: c[i : i + 1] for name, c in (cond | {"guidance": guidance}).items()}
        alone = family.forward(family.net, x[i : i + 1], t[i : i + 1], one)
        assert torch.allclose(together[i : i + 1], alone, rtol=0, atol=1e-5)


def test_schedule_is_read_from_the_scheduler(family):
    assert isinstance(family.schedule, VariancePreserving) and len(family.schedule.theta) == 1000
    table = family.pipe.scheduler.alphas_cumprod
    assert torch.allclose(family.schedule.theta.cos().square().float(), table, rtol=1e-6)
    odd = type("OddScheduler", (), {"config": {"prediction_type": "momentum"}})
    with pytest.raises(ValueError, match="'momentum' is not one of epsilon"):
        read_kind(odd())
