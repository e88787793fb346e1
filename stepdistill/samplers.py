"""Stock schedulers that walk exactly the hops of a student: proposed by rule, then tried on numbers against our maths.

Known of diffusers 0.42, each found by trying: LCMScheduler with original_inference_steps equal to its table's length T
visits round(T k / N) - 1 for every N that divides T (with 100 it does for 1, 2, 4 and 5, but not for 8); DDIMScheduler
steps down by T // N, so that it leaves its own trailing grid where N does not divide T; TCDScheduler with
original_inference_steps T visits T - 1 - floor(T k / N), ours where N divides T, and ends at timestep 0, not clean.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import Tensor

from .diffusion import Kind, read
from .roles import Roles
from .sampling import Inference, step
from .schedules import RectifiedFlow, Schedule, VariancePreserving

TOLERANCE = 2e-5  # of the trial: float32 rounding, and the 7e-6 by which LCMScheduler leans on its input at timestep 19
NAMES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}  # kinds, as DDPM-table schedulers call them
LISTS = ("sigmas", "timesteps")  # arguments of pipelines that choose any grid
SCM = "SCMScheduler"
TABLE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")


@dataclass(frozen=True)
class Sampler:
    """A scheduler of diffusers, and the arguments with which a pipeline walks one number of steps."""

    scheduler: str  # class in diffusers
    config: dict[str, Any]
    call: dict[
        str, Any
    ]  # of pipe(...): num_inference_steps, TCD's eta; timesteps or sigmas only where no config gives the grid
    students: tuple[str, ...] = ("student",)  # who takes each step, or all of them
    comfyui: dict[str, Any] | None = None  # the same in words of ComfyUI; None: not known to be the same
    a1111: dict[str, Any] | None = None
    told: float | None = None  # what the network must hear at every step in place of the scheduler's timestep, in its own units

    def build(self) -> diffusers.SchedulerMixin:
        """The scheduler object; raises ValueError where its class refuses the config."""
        return getattr(diffusers, self.scheduler).from_config(self.config)


def find_sampler(
    schedule: Schedule,
    kind: Kind,
    config: Mapping[str, Any],
    how: Inference,
    passes_sigmas: bool = False,
    takes: Collection[str] = LISTS,
    shifter: str | None = "ModelSamplingSD3",
) -> Sampler:
    """The stock sampler that takes the same steps as `sampling.sample`; its `told` is for those who know the network's units.

    config: of the teacher's own scheduler, whose noise table (if it has one) the result copies.
    passes_sigmas: the pipeline hands its scheduler the sigmas 1 - k/n itself, see `Family`.
    takes: which of LISTS the pipeline has as arguments.
    shifter: ComfyUI's node that shifts a flow model's times, one of SHIFTERS; None: ComfyUI is not known to sample it.

    Raises:
        ValueError: a stock pipeline cannot do what `how` says; the message says why.
    """
    refuse(how)
    if config.get("prediction_type") == "trigflow":
        proposals = on_angles(schedule, config, how)
    elif isinstance(schedule, RectifiedFlow):
        proposals = on_flow(schedule, config, how, passes_sigmas)
    else:
        proposals = on_table(schedule, kind, config, how)
    tried = []
    for sampler in proposals:
        if lacks := [name for name in LISTS if name in sampler.call and name not in takes]:
            tried.append(f"the pipeline takes no {lacks[0]}")
            continue
        off = deviation(sampler, schedule, kind, how, passes_sigmas)
        if off <= TOLERANCE:
            full = {k: v for k, v in sampler.build().config.items() if not k.startswith("_")}
            students = tuple(hop.role for hop in how.hops)
            students = students if len(set(students)) > 1 else students[:1]
            unknown = shifter is None or how.told is not None  # those programs tell a network its sampler's own times
            words = {} if unknown else elsewhere(schedule, kind, how, shifter)
            return Sampler(sampler.scheduler, full, sampler.call, students, **words)
        tried.append(f"{sampler.scheduler} is off by {off:.1g}")
    times = ", ".join(f"{hop.time:.4g}" for hop in how.hops)
    raise ValueError(f"no stock scheduler visits the times {times} as this student is sampled ({'; '.join(tried)})")


def refuse(how: Inference) -> None:
    """Raises ValueError if no scheduler whatever could make a stock pipeline do it."""
    others = sorted({hop.role for hop in how.hops if not hop.role.startswith("student")})
    if others:
        raise ValueError(f"the sampler asks {', '.join(others)}, and a stock pipeline has only students")
    if any(hop.scale != 1 for hop in how.hops):
        raise ValueError("the sampler guides some steps; a distilled student is sampled unguided")
    if how.told is not None and len({hop.role for hop in how.hops}) > 1:
        raise ValueError(f"the network hears time {how.told:g} at every step, and students take turns by what they hear")


def on_table(schedule: VariancePreserving, kind: Kind, config: Mapping[str, Any], how: Inference) -> Iterator[Sampler]:
    """Proposals for a DDPM table.

    Raises:
        ValueError: a hop lies between the entries of the table.
    """
    n, last = len(how.hops), len(schedule.theta) - 1
    timesteps = [round(hop.time * last) for hop in how.hops]
    for hop, timestep in zip(how.hops, timesteps, strict=True):
        if abs(hop.time * last - timestep) > 0.01:
            raise ValueError(
                f"time {hop.time:g} is timestep {hop.time * last:.2f}, and stock schedulers visit whole ones only; "
                f"write {timestep / last:.6g}, which is {timestep}"
            )
    table = {key: config[key] for key in TABLE if key in config} | {"prediction_type": NAMES[kind]}
    if "snr_shift_scale" in config:  # CogVideoX's own, which only its own schedulers make of a schedule's name
        table = {"num_train_timesteps": last + 1, "trained_betas": betas(schedule), "prediction_type": NAMES[kind]}
    table |= {"clip_sample": False, "steps_offset": 1}  # no grid below uses the offset, but SD mends any other value
    grid, listed = {"num_inference_steps": n}, {"num_inference_steps": n, "timesteps": timesteps}
    if how.eta is not None:
        whole = table | {"original_inference_steps": last + 1}
        yield from (Sampler("TCDScheduler", whole, call | {"eta": how.eta}) for call in (grid, listed))
    elif how.renoise:
        for original in (last + 1, n):
            yield Sampler("LCMScheduler", table | {"original_inference_steps": original}, grid)
        yield Sampler("LCMScheduler", table | {"original_inference_steps": last + 1}, listed)
    else:
        trailing = table | {"timestep_spacing": "trailing"}
        yield Sampler("DDIMScheduler", trailing | {"set_alpha_to_one": True}, grid)
        first_order = trailing | {"solver_order": 1, "final_sigmas_type": "zero"}  # is DDIM, and takes any grid
        yield Sampler("DPMSolverMultistepScheduler", first_order, grid)
        yield Sampler("DPMSolverMultistepScheduler", first_order, listed)


def betas(schedule: VariancePreserving) -> list[float]:
    """The betas whose table is this schedule's."""
    kept = schedule.theta.cos().square()
    return (1 - kept / torch.cat([kept.new_ones(1), kept[:-1]])).tolist()


def on_flow(
    schedule: RectifiedFlow, config: Mapping[str, Any], how: Inference, passes_sigmas: bool = False
) -> Iterator[Sampler]:
    """Proposals for rectified flow: a grid like a teacher's trailing one by config alone, then any grid as `sigmas`.

    Raises:
        ValueError: the sampler renoises in part.
    """
    if how.eta not in (None, 0, 1):
        raise ValueError(f"eta {how.eta:g} is TCD's, which no scheduler does on flow but at its ends; set it to 0 or 1")
    n, size = len(how.hops), config.get("num_train_timesteps", 1000)
    name = "FlowMatchLCMScheduler" if how.draws else "FlowMatchEulerDiscreteScheduler"
    plain = {"num_train_timesteps": size, "shift": 1.0, "use_dynamic_shifting": False, "shift_terminal": None}
    times = [hop.time for hop in how.hops]
    if passes_sigmas:
        yield Sampler(name, plain | {"shift": schedule.shift}, {"num_inference_steps": n})
    if n == 1:
        yield Sampler(name, plain, {"num_inference_steps": 1})
    elif shift := shift_of(times, schedule.shift):
        stretched = {"shift": shift if passes_sigmas else flow_shift(shift, n, size), "shift_terminal": times[-1]}
        yield Sampler(name, plain | stretched, {"num_inference_steps": n})
    yield Sampler(name, plain, {"num_inference_steps": n, "sigmas": times})


def shift_of(times: Sequence[float], default: float) -> float | None:
    """The shift S whose grid S u / (1 + (S - 1) u), u = 1 - k/n, stretched about 1, goes through times[1] and times[-1].

    1 less that grid is k / (S n - (S - 1) k). So k / (1 - times[k]) must fall by S - 1 a step from S n, both up to a factor.
    `default` if there are too few times to say; None if no shift does it.
    """
    n = len(times)
    if n < 3:
        return default
    if not all(time < 1 for time in times[1:]):
        return None
    first, last = 1 / (1 - times[1]), (n - 1) / (1 - times[-1])
    fall = (first - last) / (n - 2)
    inverse = 1 - n * fall / (first + fall)
    return 1 / inverse if inverse > 0 else None


def on_angles(schedule: RectifiedFlow, config: Mapping[str, Any], how: Inference) -> Iterator[Sampler]:
    """The one scheduler of pipelines that turn rectified flow into TrigFlow, such as Sana-Sprint's; it renoises.

    Raises:
        ValueError: the sampler does not.
    """
    n = len(how.hops)
    if n > 1 and not (how.renoise and how.eta is None):
        raise ValueError("SCMScheduler draws new noise at every step, and its pipeline takes no other; set renoise to true")
    angles = [math.atan2(hop.time, 1 - hop.time) for hop in how.hops]
    plain = {key: config[key] for key in ("num_train_timesteps", "prediction_type", "sigma_data")}
    between = angles[1] if n == 2 else None  # more steps than two are of equal angles: the pipeline cannot pass others
    yield Sampler(SCM, plain, {"num_inference_steps": n, "max_timesteps": angles[0], "intermediate_timesteps": between})


def flow_shift(shift: float, n: int, size: int) -> float:
    """The `shift` of a flow scheduler whose n sigmas, once stretched to their last, are those of a teacher's `shift`.

    Its grid is linspace(1, e), e = shift(1/size), then shifted, then stretched affinely about 1. Such a grid, and the
    one that is wanted, shift(1 - k/n), are both 1 - k / (a - b k): equal once their ends are and b/a is. With s for the
    shift that is sought and S for the given one, (s - 1)(1 - 1/size) S n = s (1 + (s - 1)/size) (S - 1)(n - 1).
    """
    a, b = (n - 1) * (shift - 1), (1 - 1 / size) * shift * n
    half = b - a * (1 - 1 / size)
    return 2 * b / (half + math.sqrt(half**2 - 4 * a * b / size))


def deviation(sampler: Sampler, schedule: Schedule, kind: Kind, how: Inference, passes_sigmas: bool = False) -> float:
    """How far the scheduler's steps and timesteps are from ours on arbitrary numbers, relative to their size.

    Infinite if it refuses, if it counts other steps, or if it wants other initial noise.
    """
    n = len(how.hops)
    named = {key: value for key, value in sampler.call.items() if key != "eta"}
    more = {key: value for key, value in sampler.call.items() if key == "eta"}
    if passes_sigmas and "sigmas" not in named:
        named |= {"sigmas": [1 - k / n for k in range(n)]}
    if "sigmas" in named or "timesteps" in named:
        del named["num_inference_steps"]
    try:
        scheduler = sampler.build()
        scheduler.set_timesteps(**named)
    except ValueError:
        return math.inf
    trig = sampler.scheduler == SCM
    timesteps = scheduler.timesteps[:-1] if trig else scheduler.timesteps
    if len(timesteps) != n or getattr(scheduler, "init_noise_sigma", 1) != 1:
        return math.inf
    size = 1000 if isinstance(schedule, RectifiedFlow) else len(schedule.theta) - 1  # timestep of time 1
    times = schedule.time(timesteps) if trig else timesteps / size
    x, off = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), 0.0
    theirs, ours = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    process = Roles(SimpleNamespace(schedule=schedule))  # no role is asked: only what they share is stepped
    for i, (hop, timestep) in enumerate(zip(how.hops, timesteps, strict=True)):
        off = max(off, abs(float(times[i]) - hop.time))
        raw = x.tanh()
        p = read(kind, raw, x, *schedule.alpha_sigma(torch.tensor([hop.time], dtype=torch.float64)))
        handed = (p.trig * scheduler.config.sigma_data, turned(scheduler, schedule, x, hop.time)) if trig else (raw, x)
        moved = scheduler.step(handed[0], timestep, handed[1], **more, generator=theirs, return_dict=False)[0]
        time = how.hops[i + 1].time if i + 1 < n else None
        x = step(process, how, p, time, lambda like: torch.randn(like.shape, generator=ours))
        wanted = turned(scheduler, schedule, x, time or 0.0) if trig else x
        off = max(off, ((moved - wanted).abs().max() / (1 + wanted.abs().max())).item())
    return off


def turned(scheduler: diffusers.SCMScheduler, schedule: Schedule, x: Tensor, time: float) -> Tensor:
    """x at that time in TrigFlow's coordinates, for data of the scheduler's standard deviation."""
    alpha, sigma = schedule.alpha_sigma(torch.tensor(time))
    return x * scheduler.config.sigma_data / (alpha**2 + sigma**2).sqrt()


SHIFTERS = {"ModelSamplingSD3": 1000, "ModelSamplingFlux": 10000}  # ComfyUI's node: entries of its table of times


def elsewhere(schedule: Schedule, kind: Kind, how: Inference, shifter: str) -> dict[str, dict[str, Any]]:
    """What to choose in ComfyUI and A1111 to load a LoRA with, where their `simple` grid is exactly ours.

    ComfyUI's takes entry 999 - int(k 1000 / n) of 1000 for k = 0, 1, ... (comfy/samplers.py), FLUX.1's of 10000, whose node
    takes the logarithm of the shift, once for large and once for small pictures; A1111's LCM sampler has every 20th entry
    only (sd_samplers_lcm.py). Tables that predict other than eps need settings of the model: left out.
    """
    n, times = len(how.hops), [hop.time for hop in how.hops]
    size = SHIFTERS.get(shifter, 1000) if isinstance(schedule, RectifiedFlow) else 1000
    entries = [size - 1 - int(k * size / n) for k in range(n)]
    comfyui = {"sampler": "lcm" if how.draws else "euler", "scheduler": "simple", "cfg": 1.0}
    roles = [hop.role for hop in how.hops]
    if len(set(roles)) > 1:  # one KSampler (Advanced) for each LoRA
        first = {role: roles.index(role) for role in roles}
        comfyui |= {role: f"steps {k} to {k + roles.count(role)}" for role, k in first.items()}
    if isinstance(schedule, RectifiedFlow):
        simple = schedule.warp(torch.tensor([(entry + 1) / size for entry in entries], dtype=torch.float64)).tolist()
        if not near(simple, times):
            return {}
        if shifter == "ModelSamplingFlux":
            log = round(math.log(schedule.shift), 6)
            return {"comfyui": comfyui | {"ModelSamplingFlux max_shift": log, "ModelSamplingFlux base_shift": log}}
        return {"comfyui": comfyui | {f"{shifter} shift": schedule.shift}}
    if kind != "eps" or len(schedule.theta) != 1000 or how.eta is not None:  # of what ends at timestep 0 none is known
        return {}
    found = {"comfyui": comfyui} if near([entry / 999 for entry in entries], times) else {}
    if how.renoise and len(set(roles)) == 1 and near([(999 - 20 * int(k * 50 / n)) / 999 for k in range(n)], times):
        found["a1111"] = {"sampler": "LCM", "schedule type": "Simple", "cfg scale": 1.0}
    return found


def near(some: list[float], others: list[float]) -> bool:
    return all(abs(a - b) < 1e-5 for a, b in zip(some, others, strict=True))
