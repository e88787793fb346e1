"""A plan in words and columns, 80 characters wide."""

from __future__ import annotations

import re
from collections.abc import Iterator
from textwrap import wrap

from .communication import ROUNDS
from .errors import UserError
from .plan import CONTEXT, SLACK, Plan

UNITS = {"": 1, "MB": 1e6, "MIB": 2**20, "GB": 1e9, "GIB": 2**30}
GB = 1e9
LARGEST = 10_000  # GB of a card that anybody asks for


def read_size(text: str) -> float:
    """Bytes of a GPU: 24GB, 24, 80 GiB. Cards are sold in GB that are GiB: 24GB means what such a card has, 24 GiB.

    Raises:
        UserError: it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(GI?B)?\s*", text, re.IGNORECASE)
    if match is None or not 0 < float(match[1]) <= LARGEST:
        raise UserError(f"--gpu {text}: must be a size in GB, at most {LARGEST}, such as 24GB")
    return float(match[1]) * 2**30


def report(plan: Plan, gpu: float | None = None) -> str:
    """All of it. gpu: bytes of the card that it must fit."""
    return "\n".join([*heading(plan), "", *memory(plan), "", *verdict(plan, gpu), "", *work(plan), "", *assumed(plan)])


def heading(plan: Plan) -> Iterator[str]:
    recipe = plan.recipe
    rows = recipe.train.batch // recipe.train.accumulate
    kind = type(recipe.strategy).__name__
    yield f"{recipe.name}: {kind} of {recipe.model.source}"
    size = " x ".join(map(str, plan.shape))
    yield f"{size}, {recipe.train.batch} samples an iteration, {rows} at a time"


def memory(plan: Plan) -> Iterator[str]:
    recipe, optim = plan.recipe, plan.recipe.optim
    quantize = recipe.model.quantize
    how = f"{recipe.model.dtype}, {quantize}" if quantize else recipe.model.dtype
    kind = f"rank {recipe.lora.rank}, float32" if recipe.lora else "whole copies, float32"
    rows = [
        ("base network", f"{plan.parameters / 1e6:,.0f} M, {how}", plan.base),
        ("what learns", f"{len(plan.roles)} x {plan.size / 1e6:,.0f} M, {kind}", plan.adapters),
        *(("", line, None) for line in wrap(", ".join(plan.roles), 44)),
        ("optimizer", optim.optimizer, plan.optimizer),
        ("gradients", "float32", plan.gradients),
    ]
    rows += [("discriminator", "", plan.heads)] if plan.heads else []
    blocks = "blocks replayed in backward" if recipe.train.checkpointing else "all kept until backward"
    rows += [(f"{who}'s activations", blocks, size) for who, size in plan.players.items()]
    rows += [(name, "while data is encoded", size) for name, size in plan.others.items()]
    rows += [("sampling", f"{recipe.eval.batch} at a time, for validation", plan.sampling)]
    rows += [("decoding", f"{recipe.eval.batch} at a time, for validation", plan.decode)]
    yield f"{'memory of one GPU':<76}GB"
    yield from (f"  {name:<24}{text:<44}{'' if size is None else f'{size / GB:8.2f}'}".rstrip() for name, text, size in rows)
    yield ""
    yield f"{'the most in each phase':<76}GB"
    yield from (f"  {name:<68}{size / GB:8.2f}" for name, size in plan.phases.items())
    yield f"  {'CUDA context':<24}{'assumed':<44}{CONTEXT / GB:8.2f}"
    yield f"  {'slack':<24}{f'assumed: {SLACK:.0%} of the largest phase':<44}{plan.phases[plan.phase] * SLACK / GB:8.2f}"


def verdict(plan: Plan, gpu: float | None) -> Iterator[str]:
    yield f"{f'peak, in the phase: {plan.phase}':<70}{plan.peak / GB:8.2f}"
    if gpu is None:
        return
    left = gpu - plan.peak
    if left >= 0:
        yield f"A card of {gpu / 2**30:g} GiB has {gpu / GB:.2f}: it fits, with {left / GB:.2f} GB to spare."
        return
    yield f"A card of {gpu / 2**30:g} GiB has {gpu / GB:.2f}: it does NOT fit, {-left / GB:.2f} GB are missing."
    yield "What would save memory, what costs least first (each alone):"
    yield from (f"  {key:<60}{size / GB:8.2f}" for key, size in plan.options if size > 0.01 * GB)
    if not plan.options:
        yield "  a smaller data.resolution, or a larger card"


def work(plan: Plan) -> Iterator[str]:
    roles = sorted({role for role, _ in plan.evaluations})
    yield f"{'an iteration, on average: samples through the network':<58}{'forward':>10}{'backward':>10}"
    for role in roles:
        forward, backward = (plan.evaluations.get((role, kind), 0.0) for kind in ("forward", "backward"))
        yield f"  {role:<56}{forward:>10.1f}{backward:>10.1f}"
    yield f"  {'floating point operations':<56}{plan.flops / 1e12:>16,.1f} T"
    yield from between(plan)
    yield "on disk"
    for name, size in plan.disk.items():
        yield f"  {f'{name} of {plan.prompts:,} prompts':<68}{size / GB:8.2f}"


def between(plan: Plan) -> Iterator[str]:
    """What processes send each other, if there are several; of n, each sends (n - 1) / n of it."""
    yield "sent by each process in an iteration, where there are many"
    for what, calls in plan.calls().items():
        yield f"  {what:<56}{sum(call.times * ROUNDS[call.kind] * call.size for call in calls) / GB:>16,.2f} GB"


def assumed(plan: Plan) -> Iterator[str]:
    yield "Counted on the real architecture without its weights. Assumed: the context and"
    yield "the slack. Not measured on a GPU: workspaces of kernels, and what the"
    yield "allocator loses to fragments."
