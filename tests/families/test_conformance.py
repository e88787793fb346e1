"""What every family owes: to be its stock pipeline, which is built from nothing and was never touched by the family.

A new family is a new row of CASES: a pipeline of students.PIPELINES, and how it is called.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from pipelines import PROMPTS, watch
from students import PIPELINES, move, student
from torch import Tensor, nn

from stepdistill.data.build import build_batches
from stepdistill.diffusion import Prediction, like
from stepdistill.export import write_export
from stepdistill.families import FAMILIES
from stepdistill.roles import Denoiser
from stepdistill.schedules import RectifiedFlow
from stepdistill.trainer import Trainer

LAYERS = nn.Linear | nn.Conv2d | nn.Conv3d
SCALE = 3.0  # of guidance, as we count it


def asked(family, x: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """x_t and t [B] of what most schedulers are handed: sample and timestep."""
    last = 1000 if isinstance(family.schedule, RectifiedFlow) else len(family.schedule.theta) - 1
    return x, torch.full([len(x)], k.item() / last)


def handed(family, p: Prediction) -> Tensor:
    return getattr(p, family.kind)


def asked_by_euler(family, x: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """EulerDiscreteScheduler's samples are x_t / alpha."""
    _, t = asked(family, x, k)
    return like(family.schedule.alpha_sigma(t)[0], x) * x, t


def asked_by_scm(family, x: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """SCMScheduler's samples and angles are TrigFlow's, with data of standard deviation sigma_data."""
    t = family.schedule.time(k.expand(len(x)))
    alpha, sigma = family.schedule.alpha_sigma(t)
    return like((alpha**2 + sigma**2).sqrt(), x) * x / family.pipe.scheduler.config.sigma_data, t


def handed_to_scm(family, p: Prediction) -> Tensor:
    return p.trig * family.pipe.scheduler.config.sigma_data


def as_long(guided: Tensor, cond: Tensor) -> Tensor:
    """Guidance that keeps the length of what is guided."""
    return guided * cond.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)


class Case(NamedTuple):
    """How a pipeline of students.PIPELINES is called."""

    call: Mapping[str, Any] = MappingProxyType({})  # arguments of pipe(...) in whatever test
    guided: Mapping[str, Any] | None = MappingProxyType(
        {"guidance_scale": SCALE}
    )  # those that make its guidance our SCALE; None: distilled
    rescale: Callable[[Tensor, Tensor], Tensor] = lambda guided, _cond: guided  # what it makes of plain guidance
    asked: Callable[..., tuple[Tensor, Tensor]] = asked
    handed: Callable[..., Tensor] = handed  # to its scheduler: what it makes of a Prediction
    last: Callable[..., Tensor] = lambda _family, stepped: stepped[0]  # latents, of its last step
    sizes: tuple[tuple[int, int], ...] = ((16, 16), (32, 24))  # height and width
    frames: int | None = None
    untouched: str = r".*embed.*"  # layers that no LoRA lies on: what makes embeddings of latents, time and text
    exports: bool = True
    strategy: str = "{name: dmd2, guidance: 1, student_every: 1}"  # what is exported


UNET = {"untouched": r"conv_in|conv_out|.*_embedding\..*"}
SANA = r".*embedder.*|patch_embed.*|caption_projection.*|.*conv_depth"
WAN = Case({"num_frames": 5}, sizes=((32, 32), (48, 32)), frames=5, untouched=r"patch_embedding|.*\.linear_\d", exports=False)
LTX = Case(
    {"num_frames": 9}, sizes=((32, 32), (64, 32)), frames=9, untouched=r"proj_in|caption_projection\..*|time_embed\.emb.*"
)
COG = Case({"num_frames": 5}, sizes=((32, 32), (32, 48)), frames=5, untouched=r"patch_embed\..*|time_embedding\..*")
CASES = {
    "eps": Case(**UNET),
    "v": Case(exports=False, **UNET),
    "sdxl": Case(asked=asked_by_euler, **UNET),
    "sdxl empty": Case(asked=asked_by_euler, exports=False, **UNET),
    "no t5": Case(exports=False),
    "flow": Case(),  # SD3 whose T5 says nothing
    "dual": Case(exports=False),
    "flux": Case(guided=None),
    "schnell": Case(guided=None, exports=False),
    "flux2": Case(guided=None),
    "klein": Case(),
    "klein distilled": Case(guided=None, exports=False),
    "pixart": Case(untouched=r".*embed.*|caption_projection.*"),
    "sana": Case(sizes=((32, 32), (64, 32)), untouched=SANA),
    "sana sprint": Case(
        {"intermediate_timesteps": None},
        guided=None,
        asked=asked_by_scm,
        handed=handed_to_scm,
        strategy="{name: dmd2, guidance: 1, student_every: 1, renoise: true, steps: 2}",
        last=lambda family, stepped: stepped[1] / family.pipe.scheduler.config.sigma_data,
        sizes=((32, 32), (64, 32)),
        untouched=SANA,
    ),
    "qwen image": Case(
        guided={"true_cfg_scale": SCALE, "negative_prompt": [" "] * 3}, rescale=as_long, untouched=r".*embed.*|.*_in"
    ),
    "z image": Case(guided={"guidance_scale": SCALE - 1}),
    "lumina2": Case(rescale=as_long, sizes=((32, 32), (64, 48))),
    **dict.fromkeys(("wan", "wan one"), WAN),
    "wan token times": WAN._replace(exports=True),
    "ltx": LTX,
    "cogvideox": COG,
    "cogvideox rope": COG._replace(exports=False),
    "cogvideox pairs": COG._replace(call={"num_frames": 9}, frames=9),
    "hunyuanvideo": Case(
        {"num_frames": 5},
        guided=None,
        sizes=((16, 16), (32, 16)),
        frames=5,
        untouched=r"x_embedder\.proj|.*_embed\..*|.*\.proj_in",
    ),
}


class Ran(NamedTuple):
    """One run of a stock pipeline in two steps."""

    pixels: Tensor
    latents: Tensor  # at its end, in our shape, like all that follows
    steps: list[tuple[Tensor, Tensor, Tensor]]  # what the scheduler was handed: prediction, x_t, and times t


@dataclass
class Made:
    case: Case
    family: Any  # at the first of the case's sizes
    stock: Any  # a pipeline with the same weights that the family never touched

    def run(self, count: int, size: tuple[int, int], **more) -> Ran:
        """On the first so many prompts."""
        case, family, shape = self.case, self.family, self.family.latent_shape(*size)
        told = {**family.sampler_call, "height": size[0], "width": size[1], "num_inference_steps": 2, "output_type": "pt"}
        moved, step = [], self.stock.scheduler.step
        self.stock.scheduler.step = lambda *args, **kw: moved.append(step(*args, **kw)) or moved[-1]
        try:
            pixels, seen = watch(self.stock, PROMPTS[:count], **told | {**case.call, **more})
        finally:
            self.stock.scheduler.step = step
        steps = [(out.reshape(-1, *shape), *case.asked(family, x.reshape(-1, *shape), k)) for out, k, x in seen]
        assert len(steps) == 2
        return Ran(pixels, case.last(family, moved[-1]).reshape(-1, *shape), steps)

    @cached_property
    def whole(self) -> Ran:
        return self.run(3, self.case.sizes[1])

    @cached_property
    def cond(self) -> dict[str, Tensor]:
        """What the family tells its network of three prompts of different lengths."""
        return self.family.encode_prompts(PROMPTS)

    @cached_property
    def some(self) -> tuple[Tensor, Tensor]:
        """Random x_t, at times that all differ."""
        x_t = torch.randn(3, *self.family.shape, generator=torch.Generator().manual_seed(0))
        return x_t, torch.tensor([0.12, 0.55, 0.93])


@pytest.fixture(scope="module", params=CASES)
def made(request):
    case, pipe = CASES[request.param], PIPELINES[request.param]()
    stock = copy.deepcopy(pipe)
    return Made(case, FAMILIES[type(pipe).__name__](pipe, case.sizes[0], case.frames), stock)


def row(cond: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    return {name: x[i : i + 1] for name, x in cond.items()}


@pytest.mark.parametrize("count", [1, 3])
@torch.no_grad()
def test_forward_is_the_pipeline_s_prediction(made, count):
    """Also at another size than the family's own, which is not square."""
    family, role = made.family, Denoiser(made.family, made.family.net)
    cond = made.cond if count == 3 else family.encode_prompts(PROMPTS[:1])
    ran = made.whole if count == 3 else made.run(1, made.case.sizes[0])
    for out, x_t, t in ran.steps:
        assert torch.allclose(made.case.handed(family, role(x_t, t, cond)), out, rtol=0, atol=1e-5)


@torch.no_grad()
def test_guided_is_the_pipeline_s_guidance(made):
    """Also in what it takes for the unconditional prediction."""
    family, case = made.family, made.case
    null = family.null_prompts()
    assert (null is None) == (case.guided is None) == family.guidance_distilled
    if null is None:
        return
    cond, null = made.cond, {name: x.expand(3, *x.shape[1:]) for name, x in null.items()}
    role = Denoiser(family, family.net)
    for out, x_t, t in made.run(3, case.sizes[0], output_type="latent", **case.guided).steps:
        guided = case.handed(family, role.guided(x_t, t, cond, null, SCALE))
        plain = case.handed(family, role(x_t, t, cond))
        assert torch.allclose(case.rescale(guided, plain), out, rtol=0, atol=2e-5)
        assert (plain - guided).abs().max() > 1e-3


@torch.no_grad()
def test_samples_are_independent(made):
    """Each has its own prompt and its own time: the same as one by one, from rows that do not know of each other."""
    family, cond, (x_t, t) = made.family, made.cond, made.some
    together = family.forward(family.net, x_t, t, cond)
    one = family.encode_prompts(PROMPTS[1:2])
    assert together.shape == x_t.shape and {len(x) for x in cond.values()} == {3}
    assert all(torch.allclose(one[name], row(cond, 1)[name], rtol=0, atol=1e-5) for name in cond)
    for i in range(3):
        alone, other = (family.forward(family.net, x_t[i : i + 1], t[i : i + 1], row(cond, j % 3)) for j in (i, i + 1))
        assert torch.allclose(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)
        assert (other - alone).abs().max() > 1e-4  # so prompts count


def test_decode_is_the_pipeline_s(made):
    latents = made.whole.latents.clone().requires_grad_()
    decoded = made.family.decode(latents)
    shown = decoded.transpose(1, 2) if decoded.ndim == 5 else decoded  # videos are shown frame by frame
    assert torch.allclose((shown / 2 + 0.5).clamp(0, 1), made.whole.pixels, rtol=0, atol=1e-5)
    decoded.sum().backward()
    assert latents.grad.abs().sum() > 0


def test_encode_undoes_decode(made, monkeypatch):
    """The autoencoder is fed what it made itself: the means of its posteriors."""
    family, size, kept = made.family, made.case.sizes[1], []
    vae, frames = family.pipe.vae, made.case.frames
    encode = vae.encode
    monkeypatch.setattr(vae, "encode", lambda x: kept.append(encode(x)) or kept[-1])
    monkeypatch.setattr(vae, "decode", lambda z, **_: (z,))
    x = torch.rand(2, 3, *([] if frames is None else [frames]), *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = family.encode(x)
    mean = kept[0].latent if hasattr(kept[0], "latent") else kept[0].latent_dist.mode()
    assert latents.shape[1:] == family.latent_shape(*size) and latents.dtype == torch.float32
    assert torch.allclose(family.decode(latents).reshape(mean.shape), mean, rtol=0, atol=1e-5)


def test_sizes_are_the_pipeline_s(made):
    """Its own picture, and multiples of what it can divide."""
    family = made.family
    assert all(edge % family.multiple == 0 for size in (*made.case.sizes, family.native) for edge in size)
    assert family.tokens >= 1 and family.shape == family.latent_shape(*made.case.sizes[0])


@torch.no_grad()
def test_features_are_tokens_of_each_sample(made):
    role = Denoiser(made.family, made.family.net)
    cond, (x_t, t) = made.cond, made.some
    p, tokens = role.features(x_t, t, cond)
    assert tokens.ndim == 3 and tokens.shape[::2] == (3, role.width)
    assert torch.equal(p.x0, role(x_t, t, cond).x0)
    for i in range(3):
        _, alone = role.features(x_t[i : i + 1], t[i : i + 1], row(cond, i))
        assert torch.allclose(tokens[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_lora_targets_reach_every_layer_but_embeddings(made):
    layers = {name for name, m in made.stock.components[made.family.net_name].named_modules() if isinstance(m, LAYERS)}
    missed = {n for n in layers if not any(n == t or n.endswith("." + t) for t in made.family.lora_targets)}
    assert {name for name in layers if re.fullmatch(made.case.untouched, name)} == missed


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.exports])
def test_a_trained_lora_is_loaded_by_a_stock_pipeline(name, tmp_path):
    """`write_export` compares the samples; the LoRA is moved after its step, so that a lost one would show."""
    case = CASES[name]
    overrides = [
        f"data.resolution={list(case.sizes[0])}",
        f"data.frames={case.frames or 'null'}",
        "lora.rank=2",
        "train.batch=2",
    ]
    distillation = student(tmp_path, name, *overrides, strategy=case.strategy)
    trainer = Trainer(distillation, build_batches(distillation.recipe, distillation.family))
    trainer.step()  # a fake score that is still the teacher teaches nothing
    assert trainer.step()["student/grad_norm"] > 0
    move(distillation)
    assert write_export(distillation, tmp_path / "export", ("diffusers",)).startswith("checked: ")
