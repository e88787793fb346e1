"""FLUX.1, told its guidance (dev) or not (schnell), against the stock pipeline, whose latents are ours in another shape."""

import math

import pipelines
import pytest
import torch
from pipelines import PROMPTS, watch
from students import student

from stepdistill.errors import UserError
from stepdistill.families import FAMILIES, Flux, Flux2Klein
from stepdistill.roles import build_roles
from stepdistill.schedules import RectifiedFlow
from stepdistill.sections import check_guidance
from stepdistill.strategies import STRATEGIES

VARIANTS = {"dev": {}, "schnell": {"guidance_embeds": False, "use_dynamic_shifting": False, "shift": 1.0}}
GENERATOR = torch.Generator().manual_seed(0)
X, T = torch.randn(3, 4, 4, 16, generator=GENERATOR), torch.tensor([0.1, 0.5, 0.95])


@pytest.fixture(scope="module", params=VARIANTS)
def family(request):
    family = FAMILIES["FluxPipeline"](pipelines.flux(**VARIANTS[request.param]), size=(16, 16))
    assert isinstance(family, Flux) and family.kind == "flow"
    return family


def test_guidance_is_the_pipeline_s(family):
    """Where the network has that input; each sample may be told its own."""
    dev = family.net.config.guidance_embeds
    cond, guidance = family.encode_prompts(PROMPTS), torch.tensor([1.5, 3.5, 6.0])
    together = family.forward(family.net, X, torch.full([3], 1.0), cond | {"guidance": guidance})
    plain = family.forward(family.net, X, torch.full([3], 1.0), cond)
    for i, scale in enumerate(guidance.tolist()):
        how = {"latents": family.packed(X[i : i + 1]), "guidance_scale": scale, "height": 16, "width": 16}
        _, seen = watch(family.pipe, PROMPTS[i : i + 1], **how)
        assert torch.allclose(family.packed(together[i : i + 1]), seen[0][0], rtol=0, atol=1e-5)
        assert torch.allclose(plain[i], together[i], rtol=0, atol=1e-5) == (not dev or scale == family.sampler_guidance)
    assert family.sampler_guidance == (3.5 if dev else 1.0)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_schedule_has_the_shift_of_its_resolution(kind):
    """The sampler's own times, at the pictures' size, are the grid of the schedule."""
    pipe = pipelines.flux(time_shift_type=kind)
    _, seen = watch(pipe, PROMPTS[:1], height=32, width=32)
    schedule = Flux(pipe, size=(32, 32)).schedule
    for (_, k, _), t in zip(seen, schedule.grid(3)[:0:-1], strict=True):
        assert math.isclose(k.item() / 1000, t, abs_tol=1e-6)
    assert schedule.shift != Flux(pipe, size=(256, 256)).schedule.shift == Flux(pipe).schedule.shift


def test_a_fixed_shift_stays():
    assert Flux(pipelines.flux(**VARIANTS["schnell"]), size=(32, 32)).schedule == RectifiedFlow(shift=1.0)


def test_only_a_network_that_has_the_input_is_told_its_guidance():
    assert build_roles(Flux(pipelines.flux()), ["student"], None, embed_guidance=True).student.whole
    with pytest.raises(ValueError, match="embed_guidance to null"):
        build_roles(Flux(pipelines.flux(**VARIANTS["schnell"])), ["student"], None, embed_guidance=True)


@pytest.mark.parametrize(
    ("strategy", "more", "remedy"),
    [
        ("{name: dmd2}", [], "strategy.guidance to 1$"),
        ("{name: lcm}", [], r"strategy.guidance to \[1, 1\]$"),
        ("{name: dmd2, decoupled: true}", [], "strategy.decoupled to false and strategy.guidance to 1$"),
        ("{name: dmd, guidance: 1}", ["pairs.guidance=3"], "pairs.guidance to 1$"),
    ],
)
def test_guidance_is_refused_before_any_work(tmp_path, strategy, more, remedy):
    with pytest.raises(UserError, match=rf"the guidance of a FluxPipeline is distilled into it.*set {remedy}"):
        student(tmp_path, "flux", "data.resolution=16", *more, strategy=strategy)


def test_guidance_is_refused_of_a_hub_id_too(tmp_path, monkeypatch):
    """Its class is known once it is loaded."""
    monkeypatch.setattr("stepdistill.sections.pipeline_class", lambda source: None)
    with pytest.raises(UserError, match=r"strategy.guidance: 8\.0, but the guidance of a FluxPipeline"):
        student(tmp_path, "flux", "data.resolution=16", strategy="{name: dmd2}")


def test_a_class_whose_pipelines_differ_is_not_refused_before_it_is_loaded():
    dmd2 = STRATEGIES["dmd2"](guidance=4.0)
    assert list(check_guidance(Flux, dmd2, None)) and not list(check_guidance(Flux2Klein, dmd2, None))
    assert list(check_guidance(Flux2Klein(pipelines.flux2(klein=True, distilled=True)), dmd2, None))
