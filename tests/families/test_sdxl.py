"""Stable Diffusion XL against the stock pipeline with its own scheduler, Euler on x_t / alpha."""

import pipelines
import pytest
import torch
from pipelines import PROMPTS, watch
from torch import nn

from stepdistill.diffusion import like
from stepdistill.families import FAMILIES, SD, SDXL
from stepdistill.roles import Denoiser
from stepdistill.schedules import VariancePreserving


@pytest.fixture(scope="module")
def family():
    family = FAMILIES["StableDiffusionXLPipeline"](pipelines.sdxl())
    assert isinstance(family, SDXL) and family.kind == "eps"
    return family


def asked(family, seen):
    """What the network was asked at each step, (raw output, x_t, t), of what its Euler scheduler was handed."""
    for out, k, x in seen:
        t = torch.full([len(x)], k.item() / 999)
        yield out, like(family.schedule.alpha_sigma(t)[0], x) * x, t


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1], [""]], ids=["three", "one", "empty"])
@pytest.mark.parametrize("size", [(16, 16), (32, 24)])
def test_forward_is_the_pipeline_s_prediction(family, prompts, size):
    cond = family.encode_prompts(prompts)
    assert {len(x) for x in cond.values()} == {len(prompts)}
    _, seen = watch(family.pipe, prompts, guidance_scale=SDXL.sampler_guidance, height=size[0], width=size[1])
    for out, x_t, t in asked(family, seen):
        assert x_t.shape[1:] == family.latent_shape(*size)
        assert torch.allclose(family.forward(family.net, x_t, t, cond), out, rtol=0, atol=1e-5)


@pytest.mark.parametrize("force_zeros", [True, False])
def test_guided_is_the_pipeline_s_guidance(force_zeros):
    """Also in what it takes for the unconditional prediction: zeros, or the empty prompt."""
    family = SDXL(pipelines.sdxl(force_zeros))
    cond, null = family.encode_prompts(PROMPTS), family.null_prompts()
    assert all(x.any() != force_zeros for x in null.values())
    null = {name: x.expand(3, *x.shape[1:]) for name, x in null.items()}
    _, seen = watch(family.pipe, PROMPTS, guidance_scale=3.0)
    assert len(seen) == 3
    for out, x_t, t in asked(family, seen):
        p = Denoiser(family, family.net).guided(x_t, t, cond, null, 3.0)
        assert torch.allclose(p.eps, out, rtol=0, atol=1e-5)


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


def test_decode_and_encode_are_the_pipeline_s(family):
    latents, _ = watch(family.pipe, PROMPTS[:2])
    pixels, _ = watch(family.pipe, PROMPTS[:2], output_type="pt")
    assert torch.allclose((family.decode(latents) / 2 + 0.5).clamp(0, 1), pixels, rtol=0, atol=1e-5)
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(family.encode(x), family.pipe.vae.encode(x).latent_dist.mode() * 0.13025)
    assert family.native == (16, 16) and latents.shape[1:] == family.latent_shape(16, 16)


def test_a_half_precision_autoencoder_that_overflows_is_float32():
    assert SDXL(pipelines.sdxl().to(torch.float16)).pipe.vae.dtype == torch.float32
    assert SDXL(pipelines.sdxl().to(torch.bfloat16)).pipe.vae.dtype == torch.bfloat16


def test_schedule_is_read_from_euler(family):
    assert isinstance(family.schedule, VariancePreserving)
    table = family.pipe.scheduler.alphas_cumprod
    assert torch.allclose(family.schedule.theta.cos().square().float(), table, rtol=1e-6)


def test_features_are_the_middle_of_the_unet(family):
    role, x_t = Denoiser(family, family.net), torch.randn(3, 4, 8, 8)
    _, tokens = role.features(x_t, torch.full([3], 0.5), family.encode_prompts(PROMPTS))
    assert tokens.shape == (3, 16, role.width) == (3, 16, 16)


def test_lora_targets_are_those_of_sd(family):
    """They reach all but what embeds the time and the size, and the first and last convolution."""
    assert SDXL.lora_targets == SD.lora_targets
    layers = {n for n, m in family.net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    missed = {n for n in layers if not any(n == t or n.endswith("." + t) for t in SDXL.lora_targets)}
    embedders = {f"{x}_embedding.linear_{i}" for x in ("time", "add") for i in (1, 2)}
    assert missed == {"conv_in", "conv_out", *embedders}
