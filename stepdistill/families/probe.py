"""What a pipeline asks of its network, and makes of the answer, seen by running it for one step between stand-ins.

A clock takes the place of its scheduler and an ear that of its network, in a copy of the pipeline that shares everything else.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

NETWORKS = ("unet", "transformer", "transformer_2")  # attributes of pipelines that hold what is distilled


class Stop(Exception):
    """The step was seen."""


class Answer(tuple):
    """What a network returns, with and without return_dict."""

    @property
    def sample(self) -> Tensor:
        return self[0]


class Clock:
    """A scheduler of one timestep. Its step notes what it is handed, and stops the pipeline or ends with `clean`."""

    order, init_noise_sigma = 1, 1.0

    def __init__(self, real: Any, timestep: float, clean: Tensor | None = None):
        self.real, self.timestep, self.clean, self.told = real, timestep, clean, {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def set_timesteps(self, num_inference_steps=None, device=None, timesteps=None, sigmas=None, mu=None, **_more) -> None:
        self.told |= {"sigmas": sigmas, "mu": mu}
        self.timesteps = torch.tensor([self.timestep] * 2, device=device)  # of which some pipelines leave out the last
        self.sigmas = torch.tensor([0.5, 0.5, 0.0])

    def set_begin_index(self, _index: int) -> None:
        pass

    def scale_model_input(self, sample: Tensor, *_timestep: Any) -> Tensor:
        return sample

    def step(self, model_output: Tensor, _timestep: Any, sample: Tensor, *_args: Any, generator=None, **_more: Any) -> Answer:
        self.told |= {"prediction": model_output, "sample": sample, "generator": generator is not None}
        if self.clean is None:
            raise Stop
        return Answer((self.clean,))


class Ear:
    """A network that notes what it is asked; it answers itself, or without any work with its input."""

    def __init__(self, net: nn.Module, answers: bool):
        self.net, self.answers, self.calls = net, answers, []
        self.signature = inspect.signature(type(net).forward)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.net, name)

    def __call__(self, *args: Any, **named: Any) -> Any:
        asked = dict(self.signature.bind(self.net, *args, **named).arguments)
        asked.pop("self", None)
        out = self.net(*args, **named) if self.answers else Answer((next(iter(asked.values())),))
        self.calls.append((asked, out[0]))
        return out


class Film:
    """An autoencoder that notes what it is to decode, and stops the pipeline there."""

    def __init__(self, real: Any, told: dict[str, Any]):
        self.real, self.told = real, told

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def decode(self, z: Tensor, *_args: Any, **_more: Any) -> None:
        self.told["z"] = z
        raise Stop


@dataclass(frozen=True)
class Seen:
    """One step of a pipeline."""

    calls: list[tuple[dict[str, Any], Any]]  # of its network: arguments by name, output
    told: dict[str, Any]  # sigmas and mu, the prediction, sample and whether a generator, z
    made: Any  # what the pipeline returned, if it was not stopped: pixels in [-1, 1]


def watch(
    pipe: Any, net_name: str, timestep: float, answers: bool = False, clean: Tensor | None = None, film: bool = False, **call
) -> Seen:
    """Run pipe(...) for one step at that timestep.

    answers: the network computes; otherwise it returns its input. clean: what the step returns, and the pipeline decodes, with
    gradient; None: it is stopped there. film: it is stopped as it would decode.
    """
    shadow = copy.copy(pipe)  # attributes that are set below, only the copy has
    clock, ear = Clock(pipe.scheduler, timestep, clean), Ear(getattr(pipe, net_name), answers)
    vars(shadow).update({"scheduler": clock, net_name: ear, "safety_checker": None})
    if film:
        vars(shadow)["vae"] = Film(pipe.vae, clock.told)
    for name in ("image_processor", "video_processor"):
        if hasattr(pipe, name):
            processor = copy.copy(getattr(pipe, name))
            processor.postprocess = processor.postprocess_video = lambda *args, **named: (*args, *named.values())[0]
            vars(shadow)[name] = processor
    run, made = inspect.unwrap(type(pipe).__call__), None  # as it is written, without no_grad
    try:
        with torch.set_grad_enabled(clean is not None and torch.is_grad_enabled()):
            made = run(shadow, return_dict=False, **call)[0]
    except Stop:
        pass
    return Seen(ear.calls, clock.told, made)


def leaves(asked: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The arguments of a call with dictionaries taken apart: "added_cond_kwargs.text_embeds"."""
    flat = {}
    for name, value in asked.items():
        flat |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `leaves`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *groups, name = path.split(".")
        at = tree
        for group in groups:
            at = at.setdefault(group, {})
        at[name] = value
    return tree


def same(a: Any, b: Any) -> bool:
    """Whether two arguments are equal, whatever holds their tensors."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def samples(seen: Seen) -> int:
    """Samples that the network was asked about for one prompt: two if it is guided."""
    return sum(len(seen.told["sample"]) * batches(asked, seen.told["sample"]) for asked, _ in seen.calls)


def batches(asked: Mapping[str, Any], sample: Tensor) -> int:
    """How many times over the sample is in one call."""
    inputs = [x for x in leaves(dict(asked)).values() if isinstance(x, Tensor) and x.shape[1:] == sample.shape[1:]]
    return max((len(x) // len(sample) for x in inputs), default=1)


def near(a: Tensor, b: Tensor) -> bool:
    tolerance = 1e-5 if a.dtype == b.dtype == torch.float32 else 1e-2
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=tolerance, atol=tolerance)
