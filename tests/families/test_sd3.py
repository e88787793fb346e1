"""Stable Diffusion 3, with and without T5, against the stock pipeline; and the counted token against 256 real ones."""

import pipelines
import pytest
import torch
from pipelines import PROMPTS, watch

from stepdistill.families import SD3
from stepdistill.families.sd3 import T5_TOKENS
from stepdistill.roles import build_roles, enable_checkpointing
from stepdistill.schedules import RectifiedFlow

VARIANTS = {"no_t5": {}, "t5": {"with_t5": True}, "dual": {"dual": (0,)}}
GENERATOR = torch.Generator().manual_seed(0)
X, T = torch.randn(3, 4, 8, 8, generator=GENERATOR), torch.tensor([0.1, 0.5, 0.95])


def test_schedule_has_the_pipeline_s_shift():
    family = SD3(pipelines.sd3())
    assert family.schedule == RectifiedFlow(shift=3.0) and family.kind == "flow"


@pytest.mark.parametrize("side", [16, 32])
def test_a_dynamic_shift_is_that_of_the_picture_s_size(side):
    pipe = pipelines.sd3()
    config = {"use_dynamic_shifting": True, "shift": 3.0}
    pipe.scheduler = pipelines.diffusers.FlowMatchEulerDiscreteScheduler(**config)
    _, seen = watch(pipe, PROMPTS[:1], height=side, width=side)
    times = torch.tensor([k.item() / 1000 for _, k, _ in seen])
    own = SD3(pipe, (side, side)).schedule.warp(torch.linspace(1, 0.001, 3))  # SD3's sampler steps down to 0.001
    assert torch.allclose(times, own, rtol=0, atol=1e-6)


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
    families = {name: SD3(pipelines.sd3(**kw)) for name, kw in VARIANTS.items()}
    assert {name: family.text_tokens for name, family in families.items()} == {"no_t5": 1, "t5": T5_TOKENS, "dual": T5_TOKENS}
    processors = {name: {type(p).__name__ for p in family.net.attn_processors.values()} for name, family in families.items()}
    assert processors["no_t5"] == {"CountedAttention"}
    assert processors["t5"] == processors["dual"] == {"JointAttnProcessor2_0"}


def test_a_guidance_embedding_is_refused():
    with pytest.raises(ValueError, match="embed_guidance to null"):
        build_roles(SD3(pipelines.sd3()), ["student"], None, embed_guidance=True)
