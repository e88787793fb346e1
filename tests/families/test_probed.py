"""Pipelines that no family is written for: found out, they are what their own family says, where that is hidden."""

import copy

import diffusers
import pytest
import torch
from pipelines import PROMPTS, aura_flow, watch
from students import PIPELINES, move, student

from stepdistill.data.build import build_batches
from stepdistill.errors import UserError
from stepdistill.export import write_export
from stepdistill.families import FAMILIES
from stepdistill.families.load import family_of
from stepdistill.families.probed import Probed, ProbedVideo, probed
from stepdistill.roles import Denoiser
from stepdistill.schedules import RectifiedFlow
from stepdistill.trainer import Trainer

KNOWN = {
    "eps": None,
    "sdxl": None,
    "dual": None,
    "flux": None,
    "pixart": None,
    "lumina2": None,
    "wan token times": 5,
    "cogvideox": 5,
}
SIZE = (32, 32)


@pytest.fixture(scope="module", params=KNOWN)
def both(request):
    """What was found out of a pipeline, and its own family."""
    pipe, frames = PIPELINES[request.param](), KNOWN[request.param]
    return probed(copy.deepcopy(pipe), SIZE, frames), FAMILIES[type(pipe).__name__](pipe, SIZE, frames)


@torch.no_grad()
def test_predictions_are_the_family_s(both):
    found, own = both
    assert (found.kind, found.latent_shape(64, 32)) == (
        own.kind,
        tuple(own.packed(torch.zeros(1, *own.latent_shape(64, 32))).shape[1:]),
    )
    x_t, t = torch.randn(3, *own.shape, generator=torch.Generator().manual_seed(0)), torch.tensor([0.2, 0.55, 0.93])
    pairs = [(found.encode_prompts(PROMPTS), own.encode_prompts(PROMPTS)), (found.null_prompts(), own.null_prompts())]
    for ours, theirs in pairs:
        assert (ours is None) == (theirs is None) == (found.guidance_distilled and ours is None)
        if ours is not None:
            cond, known = ({name: x.expand(3, *x.shape[1:]) for name, x in rows.items()} for rows in (ours, theirs))
            out = own.forward(own.net, x_t, t, known)
            out = out.chunk(2, 1)[0] if out.shape[1] == 2 * x_t.shape[1] else out
            assert torch.allclose(found.forward(found.net, own.packed(x_t), t, cond), own.packed(out), rtol=0, atol=1e-5)


def test_latents_and_pixels_are_the_family_s(both):
    found, own = both
    shape = (2, 3, *([] if own.frames is None else [own.frames]), *SIZE)
    pixels = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = own.encode(pixels)
    assert torch.allclose(found.encode(pixels), own.packed(latents), rtol=0, atol=1e-5)
    packed = own.packed(latents).requires_grad_()
    decoded = found.decode(packed)
    assert torch.allclose(decoded, own.decode(latents), rtol=0, atol=2e-5)
    decoded.sum().backward()
    assert packed.grad.abs().sum() > 0


def test_the_sampler_is_the_family_s(both):
    found, own = both
    if isinstance(own.schedule, RectifiedFlow):
        assert found.schedule == own.schedule
    assert (found.passes_sigmas, found.passes_generator, found.takes) == (own.passes_sigmas, own.passes_generator, own.takes)
    assert found.sampler_call.items() <= {"use_resolution_binning": False, "guidance_scale": own.sampler_guidance}.items()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("sana sprint", r"they are nothing of its arguments, and with the time change \['hidden_states', 'timestep'\]"),
        ("qwen image", "argument .* has no shape that all prompts share"),
        ("z image", "they are nothing of its arguments"),
        ("flux2", "in another form than its network's"),
        ("wan", "it has transformer and transformer_2"),
    ],
)
def test_what_cannot_be_found_out_is_refused(name, why):
    with pytest.raises(UserError, match=f"cannot be found out by itself: .*{why}"):
        probed(PIPELINES[name](), SIZE, 5 if name == "wan" else None)


@torch.no_grad()
def test_one_of_diffusers_that_is_in_no_table():
    """AuraFlow, whose network hears times from 0 to 1, against what the pipeline hands its scheduler."""
    pipe = aura_flow()
    assert type(pipe).__name__ not in FAMILIES
    found = family_of(pipe, (16, 16))
    null = {name: x.expand(3, *x.shape[1:]) for name, x in found.null_prompts().items()}
    cond, role = found.encode_prompts(PROMPTS), Denoiser(found, found.net)
    for scale in (1.0, 3.0):
        _, seen = watch(copy.deepcopy(pipe), PROMPTS, guidance_scale=scale, height=16, width=16)
        assert len(seen) == 3
        for out, k, x in seen:
            p = role.guided(x, torch.full([3], k.item() / 1000), cond, null, scale)
            assert torch.allclose(p.flow, out, rtol=0, atol=2e-5)


class Sharper(diffusers.StableDiffusionPipeline):
    """Somebody's own, in no table."""


def test_a_pipeline_of_somebody_s_own(capsys):
    pipe = Sharper(**PIPELINES["eps"]().components, requires_safety_checker=False)
    family = family_of(pipe)
    assert isinstance(family, Probed) and family.size == family.native == (16, 16)
    assert capsys.readouterr().out.startswith("notice: no family is written for a Sharper")
    with pytest.raises(UserError, match="no features are known of a Sharper: leave the GAN off"):
        family.feature_block(family.net)
    assert isinstance(probed(PIPELINES["wan one"](), SIZE, 5), ProbedVideo)


def test_it_is_trained_and_exported_as_others_are(tmp_path, monkeypatch):
    monkeypatch.delitem(FAMILIES, "FluxPipeline")
    made = student(
        tmp_path, "flux", "data.resolution=16", "lora.rank=2", strategy="{name: dmd2, guidance: 1, student_every: 1}"
    )
    assert isinstance(made.family, Probed)
    trainer = Trainer(made, build_batches(made.recipe, made.family))
    trainer.step()
    assert trainer.step()["student/grad_norm"] > 0
    move(made)
    assert write_export(made, tmp_path / "export").startswith("checked: pytorch_lora_weights.safetensors, in stock")
