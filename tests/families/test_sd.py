"""Stable Diffusion: what the family hands to training is what the stock pipeline hands to its scheduler."""

import pipelines
import pytest
import torch
from pipelines import PROMPTS, watch
from torch import nn

from stepdistill.families import FAMILIES, SD
from stepdistill.families.base import read_kind
from stepdistill.roles import Denoiser
from stepdistill.schedules import VariancePreserving


@pytest.fixture(scope="module", params=[("epsilon", "eps"), ("v_prediction", "v")], ids=["eps", "v"])
def family(request):
    family = FAMILIES["StableDiffusionPipeline"](pipelines.sd(request.param[0]))
    assert isinstance(family, SD) and family.kind == request.param[1]
    return family


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1], [""]], ids=["three", "one", "unconditional"])
def test_forward_is_the_pipeline_s_prediction(family, prompts):
    cond = family.encode_prompts(prompts)
    assert cond["text"].shape[0] == len(prompts)
    _, seen = watch(family.pipe, prompts, guidance_scale=SD.sampler_guidance)
    for out, k, x in seen:
        got = family.forward(family.net, x, torch.full([len(x)], k.item() / 999), cond)
        assert torch.allclose(got, out, rtol=0, atol=1e-5) and got.shape == out.shape


@pytest.mark.parametrize("scale", [3.0, torch.tensor([3.0, 3.0, 3.0])])
def test_guided_is_the_pipeline_s_guidance(family, scale):
    cond, null = family.encode_prompts(PROMPTS), family.null_prompts()
    null = {name: x.expand(3, *x.shape[1:]) for name, x in null.items()}
    _, seen = watch(family.pipe, PROMPTS, guidance_scale=3.0)
    assert len(seen) == 3
    for out, k, x in seen:
        p = Denoiser(family, family.net).guided(x, torch.full([3], k.item() / 999), cond, null, scale)
        assert torch.allclose(getattr(p, family.kind), out, rtol=0, atol=1e-5)


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


def test_decode_is_the_pipeline_s(family):
    latents, _ = watch(family.pipe, PROMPTS[:2])
    pixels, _ = watch(family.pipe, PROMPTS[:2], output_type="pt")
    assert torch.allclose((family.decode(latents) / 2 + 0.5).clamp(0, 1), pixels, rtol=0, atol=1e-5)
    family.decode(latents.requires_grad_()).sum().backward()
    assert latents.grad.abs().sum() > 0


def test_encode_undoes_decode_in_scale(family, monkeypatch):
    """With an autoencoder that does nothing, latents are pixels times the scaling factor."""
    pipelines.inert(family.pipe.vae, monkeypatch)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(family.encode(x), 0.18215 * x) and torch.allclose(family.decode(family.encode(x)), x)


def test_encode_takes_the_mean_of_the_posterior(family):
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    want = family.pipe.vae.encode(x).latent_dist.mode() * family.pipe.vae.config.scaling_factor
    assert torch.equal(family.encode(x), want) and torch.equal(family.encode(x), family.encode(x))


def test_latent_shape_and_resolution_are_the_pipeline_s(family):
    latents, _ = watch(family.pipe, PROMPTS)
    assert family.native == (16, 16) and latents.shape[1:] == family.latent_shape(16, 16)
    latents, _ = watch(family.pipe, PROMPTS[:1], height=32, width=24)
    assert latents.shape[1:] == family.latent_shape(32, 24)


def test_features_are_the_middle_of_the_unet(family):
    role, x = Denoiser(family, family.net), torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    p, tokens = role.features(x, torch.full([3], 0.5), family.encode_prompts(PROMPTS))
    assert tokens.shape == (3, 16, role.width) == (3, 16, 16)
    assert torch.equal(p.x0, role(x, torch.full([3], 0.5), family.encode_prompts(PROMPTS)).x0)
    assert not family.net.mid_block._forward_hooks


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


def test_lora_targets_reach_every_kind_of_layer(family):
    """Attention, feed-forward, convolutions and time projections; not the first and last convolution."""
    layers = {n for n, m in family.net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    reached = {n for n in layers if any(n == t or n.endswith("." + t) for t in SD.lora_targets)}
    assert layers - reached == {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"}
