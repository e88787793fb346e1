"""Stable Diffusion 3, with and without T5, against the stock pipeline; and the counted token against 256 real ones."""

import copy

import pipelines
import pytest
import torch
from pipelines import PROMPTS, watch
from torch import nn

from stepdistill.families import FAMILIES, SD3
from stepdistill.families.sd3 import T5_TOKENS
from stepdistill.roles import Denoiser, build_roles, enable_checkpointing
from stepdistill.schedules import RectifiedFlow

VARIANTS = {"no_t5": {}, "t5": {"with_t5": True}, "dual": {"dual": (0,)}}
GENERATOR = torch.Generator().manual_seed(0)
X, T = torch.randn(3, 4, 8, 8, generator=GENERATOR), torch.tensor([0.1, 0.5, 0.95])


@pytest.fixture(scope="module", params=VARIANTS)
def made(request):
    """A family, and a stock pipeline with the same weights that the family never touched."""
    pipe = pipelines.sd3(**VARIANTS[request.param])
    stock = copy.deepcopy(pipe)
    family = FAMILIES["StableDiffusion3Pipeline"](pipe)
    assert isinstance(family, SD3) and family.text_tokens == (1 if request.param == "no_t5" else T5_TOKENS)
    return family, stock


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1], [""]], ids=["three", "one", "unconditional"])
def test_forward_is_the_pipeline_s_prediction(made, prompts):
    family, stock = made
    cond = family.encode_prompts(prompts)
    assert cond["text"].shape[:2] == (len(prompts), 77 + family.text_tokens)
    _, seen = watch(stock, prompts, guidance_scale=SD3.sampler_guidance)
    for out, k, x in seen:
        got = family.forward(family.net, x, torch.full([len(x)], k.item() / 1000), cond)
        assert torch.allclose(got, out, rtol=0, atol=1e-5)


def test_guided_is_the_pipeline_s_guidance(made):
    family, stock = made
    null = {name: x.expand(3, *x.shape[1:]) for name, x in family.null_prompts().items()}
    _, seen = watch(stock, PROMPTS, guidance_scale=4.0)
    assert len(seen) == 3
    for out, k, x in seen:
        t = torch.full([3], k.item() / 1000)
        p = Denoiser(family, family.net).guided(x, t, family.encode_prompts(PROMPTS), null, 4.0)
        assert torch.allclose(p.flow, out, rtol=0, atol=2e-5)


def test_decode_encode_and_shapes_are_the_pipeline_s(made, monkeypatch):
    family, stock = made
    latents, _ = watch(stock, PROMPTS[:2])
    pixels, _ = watch(stock, PROMPTS[:2], output_type="pt")
    assert torch.allclose((family.decode(latents) / 2 + 0.5).clamp(0, 1), pixels, rtol=0, atol=1e-5)
    assert family.native == (16, 16) and latents.shape[1:] == family.latent_shape(16, 16)
    vae = family.pipe.vae
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    mean = vae.encode(x).latent_dist.mode()
    assert torch.allclose(family.encode(x), (mean - 0.06) * 1.53, rtol=0, atol=1e-6)
    monkeypatch.setattr(vae, "decode", lambda z, return_dict: (z,))
    assert torch.allclose(family.decode(family.encode(x)), mean, rtol=0, atol=1e-6)


def test_schedule_has_the_pipeline_s_shift(made):
    assert made[0].schedule == RectifiedFlow(shift=3.0) and made[0].kind == "flow"


@pytest.mark.parametrize("side", [16, 32])
def test_a_dynamic_shift_is_that_of_the_picture_s_size(side):
    pipe = pipelines.sd3()
    config = {"use_dynamic_shifting": True, "shift": 3.0}
    pipe.scheduler = pipelines.diffusers.FlowMatchEulerDiscreteScheduler(**config)
    _, seen = watch(pipe, PROMPTS[:1], height=side, width=side)
    times = torch.tensor([k.item() / 1000 for _, k, _ in seen])
    own = SD3(pipe, (side, side)).schedule.warp(torch.linspace(1, 0.001, 3))  # SD3's sampler steps down to 0.001
    assert torch.allclose(times, own, rtol=0, atol=1e-6)


def test_features_are_picture_tokens(made):
    family, _ = made
    role, cond = Denoiser(family, family.net), family.encode_prompts(PROMPTS)
    p, tokens = role.features(X, T, cond)
    assert tokens.shape == (3, 16, role.width) == (3, 16, 16)  # 8 x 8 in patches of 2
    assert torch.equal(p.x0, role(X, T, cond).x0)


def lora(pipe, rank=4):
    """A family of the pipeline with one open adapter whose B is not zero, all in float64."""
    family = SD3(pipe)
    student = build_roles(family, ["student"], rank, seed=3).student
    family.net.double()
    generator = torch.Generator().manual_seed(1)
    for name, p in student.named_parameters().items():
        p.requires_grad_()
        if "lora_B" in name:
            p.data.normal_(0, 0.2, generator=generator)
    return family, student


@pytest.fixture(scope="module")
def gradients():
    """Output and LoRA gradients with 256 explicit zero tokens: the same network, its stock attention put back."""
    family, student = lora(pipe := pipelines.sd3())
    counted = family.encode_prompts(PROMPTS)
    text = torch.cat([counted["text"], counted["text"][:, -1:].expand(-1, T5_TOKENS - 1, -1)], 1)
    assert not text[:, 77:].any()
    pipe.transformer.set_attn_processor(pipelines.diffusers.models.attention_processor.JointAttnProcessor2_0())
    out = student(X, T, counted | {"text": text}).flow
    return out, torch.autograd.grad(out.square().sum(), student.parameters())


@pytest.mark.parametrize("checkpointed", [False, True])
def test_one_counted_token_is_256_zero_tokens(gradients, checkpointed):
    family, student = lora(pipelines.sd3())
    if checkpointed:
        enable_checkpointing(family.net)
    out = student(X, T, family.encode_prompts(PROMPTS)).flow
    got = torch.autograd.grad(out.square().sum(), student.parameters())
    want_out, want = gradients
    assert torch.allclose(out, want_out, rtol=0, atol=1e-10)
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)
    assert sum(g.abs().max() > 1e-3 for g in want) > len(want) / 2  # the comparison is not of zeros


def test_the_last_token_s_count_matters(gradients):
    """Counted once, the zero token would be a different network: the agreement above is not for want of attention."""
    family, student = lora(pipelines.sd3())
    family.net.set_attn_processor(pipelines.diffusers.models.attention_processor.JointAttnProcessor2_0())
    out = student(X, T, family.encode_prompts(PROMPTS)).flow
    assert (out - gradients[0]).abs().max() > 1e-3


def test_counting_is_only_where_tokens_stay_equal():
    processors = {
        name: {type(p).__name__ for p in SD3(pipelines.sd3(**kw)).net.attn_processors.values()} for name, kw in VARIANTS.items()
    }
    assert processors["no_t5"] == {"CountedAttention"}
    assert processors["t5"] == processors["dual"] == {"JointAttnProcessor2_0"}


def test_a_guidance_embedding_is_refused():
    with pytest.raises(ValueError, match="embed_guidance to null"):
        build_roles(SD3(pipelines.sd3()), ["student"], None, embed_guidance=True)


def test_lora_targets_reach_every_kind_of_layer():
    """Attention, feed-forward, modulation and the last layer; not what makes embeddings of pixels, time and text."""
    layers = {n for n, m in pipelines.sd3().transformer.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    missed = {n for n in layers if not any(n == t or n.endswith("." + t) for t in SD3.lora_targets)}
    embedders = [f"time_text_embed.{x}_embedder.linear_{i}" for x in ("timestep", "text") for i in (1, 2)]
    assert missed == {"pos_embed.proj", "context_embedder", *embedders}
