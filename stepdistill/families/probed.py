"""Any pipeline that no family is written for, as one that is: found out by watching it, or refused with what is in the way."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..schedules import RectifiedFlow
from .base import Family, shifted
from .probe import NETWORKS, Seen, leaves, near, nested, same, samples, watch

SHORT, LONG = "a", "a photograph of seven red cats, two of them asleep"
TIMES = (250.0, 750.0)  # two timesteps, which tell how the network hears them
STEPS = 4  # that the pipeline is asked for, to see the sigmas that it hands its scheduler
SCALE = 2.0  # of guidance, to see the unconditional input
ANSWERS = {  # what pipelines make of the network's output
    "as it is": lambda out: out,
    "negated": lambda out: -out,
    "without its variance": lambda out: out.chunk(2, 1)[0],
}
TROUBLE = (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, NotImplementedError)


class Probed(Family):
    """The pipeline itself encodes prompts, and decodes, at `size` alone. What it cannot tell: which layers deserve a LoRA (the
    attention's are taken), and where features are (there are none, so no GAN)."""

    pipeline = "DiffusionPipeline"
    passes_generator = False
    scale = 1.0  # the pipeline's guidance_scale that means none

    def __init__(self, pipe: Any, size: tuple[int, int] | None = None, frames: int | None = None):
        self.pipe, self.pipeline = pipe, type(pipe).__name__
        names = [name for name in NETWORKS if getattr(pipe, name, None) is not None]
        if len(names) != 1:
            raise self.refusal(
                f"its network is one of {', '.join(NETWORKS)}, and it has {' and '.join(names) or 'none of them'}"
            )
        self.net_name = names[0]
        self.arguments = inspect.signature(type(pipe).__call__).parameters
        try:
            super().__init__(pipe, size, frames)
            self.learn()
        except UserError:
            raise
        except TROUBLE as error:
            raise self.refusal(f"run for one step it raised {type(error).__name__}: {error}") from None
        self.lora_targets = targets(self.net, self.lora_targets)

    def refusal(self, why: str) -> UserError:
        return UserError(f"a {self.pipeline} is not among the pipelines supported, and cannot be found out by itself: {why}")

    def watch(self, prompts: list[str], timestep: float = TIMES[0], **more: Any) -> Seen:
        """One step of the pipeline for these prompts; `more` are arguments of `probe.watch` and of the pipeline."""
        call = dict(zip(("height", "width", "num_frames"), (*self.size, self.frames), strict=True)) | self.sampler_call
        call |= {"prompt": list(prompts), "num_inference_steps": STEPS, "output_type": "latent"}
        call |= {"generator": torch.Generator().manual_seed(0)} | more
        ours = ("answers", "clean", "film")
        known = {key: value for key, value in call.items() if key in self.arguments or key in ours}
        return watch(self.pipe, self.net_name, timestep, **known)

    @torch.no_grad()
    def learn(self) -> None:
        """Everything that `forward` and `encode_prompts` go by."""
        seen = self.watch([SHORT], answers=True)
        if samples(seen) != 1:
            self.scale = 0.0  # of pipelines that count guidance from there
            seen = self.watch([SHORT], answers=True)
        if samples(seen) != 1:
            raise self.refusal("it guides whatever its guidance_scale, so its network is never asked for one prompt alone")
        self.guidance_distilled = samples(self.watch([SHORT], guidance_scale=SCALE)) == 1
        if self.guidance_distilled and "guidance_scale" in self.arguments:
            self.scale = self.default("guidance_scale")
            seen = self.watch([SHORT], answers=True)
        self.learn_arguments(seen)
        out = seen.calls[0][1]
        prediction = seen.told["prediction"]
        self.row = tuple(seen.told["sample"].shape[1:])
        if not self.takes_latents(prediction):
            raise self.refusal("it takes or gives `latents` in another form than its network's")
        fits = [name for name, turn in ANSWERS.items() if isinstance(out, Tensor) and near(turn(out), prediction)]
        if not fits:
            raise self.refusal(
                "it hands its scheduler something else than its network's output, its negative or its first half"
            )
        self.answer = fits[0]
        self.passes_generator = seen.told["generator"]
        sigmas, mu = seen.told["sigmas"], seen.told["mu"]
        if sigmas is not None and not near(torch.as_tensor(sigmas), torch.tensor([1.0, 0.75, 0.5, 0.25])):
            raise self.refusal(
                f"it hands its scheduler sigmas of its own, {[round(float(s), 3) for s in sigmas]} for {STEPS} steps"
            )
        self.passes_sigmas = sigmas is not None
        if mu is not None and self.pipe.scheduler.config.get("use_dynamic_shifting"):
            self.schedule = shifted(self.pipe.scheduler.config, float(mu))

    def takes_latents(self, x: Tensor) -> bool:
        """Whether the pipeline begins with latents x, and returns them, as they are."""
        try:
            seen = self.watch([SHORT], latents=x, clean=x)
        except TROUBLE:
            return False
        return near(seen.told["sample"], x) and near(seen.made, x)

    def learn_arguments(self, seen: Seen) -> None:
        """Which arguments of the network are the latents, the time, rows of prompts, and always the same."""
        first, later, other, both = (
            leaves(calls[0][0])
            for calls in (
                seen.calls,
                self.watch([SHORT], TIMES[1]).calls,
                self.watch([LONG]).calls,
                self.watch([SHORT, LONG]).calls,
            )
        )
        latents = [name for name, x in first.items() if same(x, seen.told["sample"])]
        times = [name for name, x in first.items() if not same(x, later[name])]
        if len(latents) != 1 or len(times) != 1:
            raise self.refusal(
                f"its network is not asked with the latents and a time, as they are: they are {latents or 'nothing'} of its "
                f"arguments, and with the time change {times or 'none'}"
            )
        self.latents, self.time = latents[0], times[0]
        low, high = (float(torch.as_tensor(x[self.time]).flatten()[0]) for x in (first, later))
        self.pace = (high - low) / (TIMES[1] - TIMES[0])
        self.offset = low - self.pace * TIMES[0]
        self.times_shape = torch.as_tensor(first[self.time]).shape[1:]  # of a sample
        self.rows: list[str] = []
        self.constants: dict[str, Any] = {}
        for name in (name for name in first if name not in (self.latents, self.time)):
            x, y, z = first[name], other[name], both[name]
            if isinstance(x, Tensor) and x.ndim and len(z) == 2 * len(x) and x.shape == y.shape and z.shape[1:] == x.shape[1:]:
                self.rows.append(name)
            elif same(x, y) and same(x, z):
                self.constants[name] = x
            else:
                raise self.refusal(f"the network's argument {name} has no shape that all prompts share, or is no tensor")

    @property
    def sampler_call(self) -> dict[str, Any]:
        call = {"guidance_scale": self.scale, "use_resolution_binning": False, "intermediate_timesteps": None}
        return {name: value for name, value in call.items() if name in self.arguments}

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        asked = leaves(self.watch(prompts).calls[0][0])
        return {name: asked[name] for name in self.rows}

    @torch.no_grad()
    def null_prompts(self) -> dict[str, Tensor] | None:
        """What the pipeline asks besides the prompt's own when it guides."""
        if self.guidance_distilled:
            return None
        own = self.encode_prompts([SHORT])
        calls = [leaves(asked) for asked, _ in self.watch([SHORT], guidance_scale=SCALE).calls]
        parts = [{name: x[name][i : i + 1] for name in self.rows} for x in calls for i in range(len(x[self.latents]))]
        return next(part for part in parts if not all(same(part[name], own[name]) for name in self.rows))

    def timestep(self, t: Tensor) -> Tensor:
        last = 1000 if isinstance(self.schedule, RectifiedFlow) else len(self.schedule.theta) - 1
        return self.pace * last * t + self.offset

    def forward(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        time = self.timestep(t).reshape(-1, *[1] * len(self.times_shape)).expand(-1, *self.times_shape)
        rows = {name: cond[name] for name in self.rows}
        asked = self.constants | rows | {self.latents: x_t.to(net.dtype), self.time: time}
        return ANSWERS[self.answer](net(**nested(asked))[0])

    def decode(self, latents: Tensor) -> Tensor:
        prompts = [SHORT] * len(latents)
        return self.watch(prompts, clean=latents.to(self.pipe.vae.dtype), output_type="pt").made.float()

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """As `Family`'s: what `decode` hands the autoencoder must be its latents, each scaled and shifted, in some order."""
        vae, (low, size, order) = self.pipe.vae, self.unpacking()
        images = images[:, :, None] if images.ndim < low.ndim else images
        made = vae.encode(images.to(vae.device, vae.dtype))
        z = made.latent_dist.mean if hasattr(made, "latent_dist") else made.latent
        latents = z.new_empty(len(z), order.numel())
        latents[:, order] = ((z - low) / size).flatten(1)
        return latents.reshape(-1, *self.row).float()

    def unpacking(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the autoencoder decodes of latents that are 0, how much more of 1, and which of the latents it finds where."""
        zeros = torch.zeros(1, *self.row, device=self.pipe.vae.device, dtype=self.pipe.vae.dtype)
        low = self.filmed(zeros)
        size, place, base = self.filmed(zeros + 1) - low, torch.arange(zeros.numel(), device=zeros.device), 32
        order, power = torch.zeros_like(place), 1
        while power < len(place):  # digit by digit, each small enough for half precision
            digit = (place // power % base).to(zeros.dtype).reshape(zeros.shape)
            order += ((self.filmed(digit) - low) / size).round().long().flatten() * power
            power *= base
        return low, size, order

    def filmed(self, latents: Tensor) -> Tensor:
        return self.watch([SHORT], clean=latents, film=True, output_type="pt").told["z"]

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        return (
            self.row
            if (height, width) == self.size
            else tuple(self.watch([SHORT], height=height, width=width).told["sample"].shape[1:])
        )

    @property
    def factor(self) -> int:
        names = ("vae_scale_factor", "vae_scale_factor_spatial", "vae_spatial_compression_ratio")
        return next((int(getattr(self.pipe, name)) for name in names if hasattr(self.pipe, name)), 8)

    @property
    def multiple(self) -> int:
        return self.factor if self.net_name == "unet" else 2 * self.factor

    @property
    def native(self) -> tuple[int, int]:
        sides = tuple(self.default(name) for name in ("height", "width"))
        side = getattr(self.pipe, "default_sample_size", None) or getattr(self.net.config, "sample_size", None)
        if not all(sides) and not isinstance(side, int):
            raise self.refusal("it does not say what size its pictures have; set data.resolution")
        return sides if all(sides) else (side * self.factor, side * self.factor)

    @property
    def encoders(self) -> list[nn.Module]:
        return []  # that could wait off the device: decoding takes them too

    def feature_block(self, net: nn.Module) -> nn.Module:
        raise UserError(f"no features are known of a {self.pipeline}: leave the GAN off, or write a family for it")

    def feature_tokens(self, out: Any, x_t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return self.feature_block(self.net)

    def feature_width(self, net: nn.Module) -> int:
        return self.feature_block(net)


class ProbedVideo(Probed):
    frames = 1  # or what the pipeline makes by itself

    def __init__(self, pipe: Any, size: tuple[int, int] | None = None, frames: int | None = None):
        default = inspect.signature(type(pipe).__call__).parameters["num_frames"].default
        super().__init__(pipe, size, frames or default)

    fps = 16.0  # a guess

    @property
    def frame_multiple(self) -> int:
        names = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio")
        return next((int(getattr(self.pipe, name)) for name in names if hasattr(self.pipe, name)), 1)


def probed(pipe: Any, size: tuple[int, int] | None = None, frames: int | None = None) -> Probed:
    """A family of pipe, found out by running it.

    Raises:
        UserError: it cannot be found out; why.
    """
    kind = ProbedVideo if "num_frames" in inspect.signature(type(pipe).__call__).parameters else Probed
    return kind(pipe, size, frames)


def targets(net: nn.Module, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """Names of layers for a LoRA: those of attention if there are any, else of all linear ones."""
    linear = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    return wanted if any(name.endswith(wanted) for name in linear) else tuple(sorted({n.rsplit(".", 1)[-1] for n in linear}))


def notice(family: Probed) -> str:
    """What the user should know of it, in one line."""
    return (
        f"notice: no family is written for a {family.pipeline}, so it was run for one step to find out. LoRA on "
        f"{', '.join(family.lora_targets)} (a guess: see lora.targets); no features, so no GAN; slow to encode and decode"
    )
