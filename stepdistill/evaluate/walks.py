"""Ways to walk from noise to latents, as functions: the student's own, and the teacher with a stock solver."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from torch import Tensor

from ..assemble import Distillation
from ..batch import Draw, seed_of
from ..data.texts import Texts
from ..devices import placed, tiled
from ..sampling import Inference, Normal, sample

Walk = Callable[[Tensor, dict[str, Tensor], dict[str, Tensor] | None, Normal], Tensor]
Sampler = Callable[[list[str], int], np.ndarray]  # (captions, index of the first) -> uint8 [N, H, W, 3]

SOLVERS = ("first order", "DPM-Solver++", "UniPC")  # first order is DDIM or, on flow, Euler


def student_walk(distillation: Distillation, how: Inference) -> Walk:
    """The student, with its average where there is one."""
    roles = distillation.students()
    return lambda noise, cond, null, normal: sample(roles, how, noise, cond, normal, null)


def teacher_walk(distillation: Distillation, solver: str, steps: int, scale: float) -> Walk:
    """The teacher with a training-free solver of diffusers, at its trailing grid; scale 1 is unguided."""
    teacher = distillation.roles.teacher
    last = 1000 if teacher.kind == "flow" else len(distillation.roles.schedule.theta) - 1  # the timestep of t = 1

    @torch.no_grad()
    def walk(noise: Tensor, cond: dict[str, Tensor], null: dict[str, Tensor] | None, normal: Normal) -> Tensor:
        scheduler = new_solver(solver, distillation, steps)
        x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
        for timestep in scheduler.timesteps:
            t = x.new_full([len(x)], float(timestep) / last)
            p = teacher.guided(x, t, cond, null, scale)
            x = scheduler.step(getattr(p, teacher.kind), timestep, x, return_dict=False)[0]
        return x

    return walk


def new_solver(solver: str, distillation: Distillation, steps: int) -> SchedulerMixin:
    """A fresh scheduler, its timesteps set.

    Raises:
        ValueError: solver is none of SOLVERS.
    """
    config, flow = distillation.family.pipe.scheduler.config, distillation.roles.teacher.kind == "flow"
    if solver not in SOLVERS:
        raise ValueError(f"solver {solver!r} is not one of {', '.join(SOLVERS)}")
    if solver == "first order" and flow:  # equal steps from 1 down to 1/N: see inference.py
        end = {} if steps == 1 else {"shift_terminal": 1 / steps}
        scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, **end)
    elif solver == "first order":
        scheduler = DDIMScheduler.from_config(config, timestep_spacing="trailing")
    else:
        kind = {"DPM-Solver++": DPMSolverMultistepScheduler, "UniPC": UniPCMultistepScheduler}[solver]
        space = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"} if flow else {}
        base = {} if flow else dict(config) | {"timestep_spacing": "trailing"}
        scheduler = kind.from_config(base, **space)
    scheduler.set_timesteps(steps)
    return scheduler


def sampler(distillation: Distillation, walk: Walk, seed: int = 0, batch: int = 64, texts: Texts | None = None) -> Sampler:
    """Pictures whose noise depends on seed and on their index alone, whatever the batch. texts: those that are encoded."""
    family = distillation.family
    shape, device = family.shape, distillation.roles.teacher.net.device
    texts = texts or Texts(family)

    @torch.no_grad()
    def pictures(captions: list[str], first: int) -> np.ndarray:
        out = []
        for i in range(0, len(captions), batch):
            some = captions[i : i + batch]
            draw = Draw(seed_of(seed, "picture"), 0, range(first + i, first + i + len(some)), device)
            noise = draw.normal(torch.empty(len(some), *shape))
            cond = {name: x.to(device) for name, x in texts(some).items()}
            nulls = texts.null and {name: x.expand(len(some), *x.shape[1:]) for name, x in texts.null.items()}
            latents = walk(noise, cond, nulls, draw.normal)
            with placed([family.pipe.vae], device), tiled(family.pipe.vae, family.size):
                out.append(to_pixels(family.decode(latents)))
        return np.concatenate(out)

    return pictures


def to_pixels(images: Tensor) -> np.ndarray:
    """[N, 3, H, W] in [-1, 1] -> uint8 [N, H, W, 3], rounded as diffusers does; of videos see `strip`."""
    images = strip(images) if images.ndim == 5 else images
    scaled = (images.float().cpu() / 2 + 0.5).clamp(0, 1) * 255
    return scaled.round().byte().permute(0, 2, 3, 1).numpy()


def strip(videos: Tensor) -> Tensor:
    """[N, 3, frames, H, W] -> [N, 3, 3 H, W]: the first frame, below it the middle one, and the last."""
    last = videos.shape[2] - 1
    return torch.cat([videos[:, :, k] for k in (0, last // 2, last)], -2)
