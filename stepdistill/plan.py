"""What a recipe will need of a GPU and a disk, found before anything is downloaded: `stepdistill plan`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from .architectures import find, known
from .communication import FLOAT, Call, replicated, sharded
from .costs import HOST, WEIGHT, Costs, weigh
from .data.build import read_prompts
from .devices import tiled
from .errors import UserError
from .families import FAMILIES, Family
from .families.load import check_size
from .live_bytes import LiveBytes
from .meta import build_pipeline, open_folder
from .plan_trial import try_out
from .recipe import Recipe
from .roles import build_roles, enable_checkpointing
from .sources import embedded_models, is_hub_id

CONTEXT, SLACK = 1e9, 0.10  # assumed: bytes of the CUDA context, and the share that allocator and workspaces add
PARTS = 1  # bytes do not depend on how many a network is shared out in
MOMENTS = {"adamw": 8.0, "adamw8bit": 2.0 + 8 / 256}  # bytes of optimizer state for each number that learns


@dataclass(frozen=True)
class Plan:
    """Bytes of one GPU, samples through the networks and operations of one iteration, bytes on disk."""

    recipe: Recipe
    base: int  # the frozen network, quantised or not
    parameters: int
    shape: tuple[int, ...]  # frames, height, width in pixels
    adapters: int  # weights of all roles that learn, and of averages
    size: int  # numbers in one adapter
    roles: tuple[str, ...]
    heads: int
    optimizer: int
    gradients: int
    others: dict[str, int]  # text encoders, autoencoder
    players: dict[str, int]  # activations and all else that comes and goes in each player's part
    sampling: int  # what comes and goes while the guided teacher samples eval.batch pictures
    decode: int  # and while they are decoded
    decodes: bool  # the strategy decodes while it trains, so that the autoencoder stays
    evaluations: dict[tuple[str, str], float]  # (role, forward or backward) -> samples an iteration
    flops: float
    passes: tuple[float, float]  # through a network in an iteration, forward and backward, however many samples in each
    moves: dict[str, tuple[int, float]]  # player -> numbers that it learns, and how often it moves in an iteration
    disk: dict[str, int]
    prompts: int
    options: list[tuple[str, int]] = field(default_factory=list)  # key=value, and the bytes that it saves

    @property
    def resident(self) -> int:
        """What never leaves the GPU while it trains."""
        return self.base + self.adapters + self.heads + self.optimizer

    def calls(self) -> dict[str, list[Call]]:
        """What processes that work together call in an iteration, with whole networks and with networks in shares."""
        forward, backward = self.passes
        if self.recipe.lora:
            return {
                "gradients of adapters": replicated(self.moves),
                "the base's weights, with train.shard": sharded(self.base, PARTS, forward, backward),
            }
        learns = FLOAT * self.size
        return {
            "gradients of whole copies": replicated(self.moves),
            "weights and gradients instead, with train.shard": sharded(learns, PARTS, forward, backward, learns),
        }

    @property
    def phases(self) -> dict[str, int]:
        """The most bytes in each phase, without assumptions."""
        autoencoder = self.others.get("autoencoder", 0)
        found = {"encoding": self.base + self.adapters + self.heads + sum(self.others.values())}
        for who, size in self.players.items():
            found[f"{who}'s step"] = self.resident + self.gradients + size + autoencoder * self.decodes
        found["validation"] = self.resident + max(self.sampling, autoencoder + self.decode)
        return found

    @property
    def phase(self) -> str:
        """That of the peak."""
        return max(self.phases, key=self.phases.__getitem__)

    @property
    def peak(self) -> float:
        """Bytes, with what is assumed."""
        return self.phases[self.phase] * (1 + SLACK) + CONTEXT


def make_plan(recipe: Recipe) -> Plan:
    """Measure a recipe of a folder or of a known model without its weights.

    Raises:
        UserError: the model is not one that is known, or its folder lacks a config.
    """
    with LiveBytes() as live:
        family, prompt = open_family(recipe)
        check_size(family)
        return plan_of(recipe, family, prompt, live)


def plan_of(recipe: Recipe, family: Family, prompt: dict[str, tuple[int, ...]], live: LiveBytes) -> Plan:
    """The plan for a family on the meta device, while `live` is on. prompt: shapes of one encoded prompt."""
    costs, net = open_costs(recipe, family, prompt, live)
    size = sum(p.numel() for p in costs.student.parameters())
    base = weigh(net, recipe.model.quantize) - 4 * size * (recipe.lora is not None)
    tried = try_out(recipe, costs, size)
    others = {"text encoders": sum(map(weigh, family.encoders)), "autoencoder": weigh(family.pipe.vae)}
    decode = decoding(family, recipe.eval.batch, live)
    optimizer = recipe.optim.optimizer
    count = len(read_prompts(recipe.data.prompts, recipe.data.count))
    row = sum(x.numel() * x.element_size() for x in costs.cond.values())
    disk = {"text embeddings": count * row}
    if "x0" in recipe.strategy.needs:
        disk["latents"] = count * 4 * torch.Size(family.shape).numel()
    plan = Plan(
        recipe=recipe,
        base=base,
        parameters=sum(p.numel() for p in net.parameters()) - size * (recipe.lora is not None),
        shape=(*([family.frames] if family.frames else []), *family.size),
        adapters=4 * size * len(tried.roles),
        size=size,
        roles=tried.roles,
        heads=tried.heads,
        optimizer=round(tried.learning * MOMENTS[optimizer]),
        gradients=4 * tried.learning,
        others={name: size for name, size in others.items() if size},
        players=tried.players,
        sampling=costs(2 * recipe.eval.batch, False).forward,
        decode=decode,
        decodes=recipe.strategy.decodes,
        evaluations=tried.evaluations,
        flops=tried.flops,
        passes=tried.passes,
        moves=tried.moves,
        disk=disk,
        prompts=count,
    )
    return dataclasses.replace(plan, options=options(plan, costs))


def open_family(recipe: Recipe) -> tuple[Family, dict[str, tuple[int, ...]]]:
    """The family of a model without its weights, and the shapes of an encoded prompt."""
    source, dtype = recipe.model.source, getattr(torch, recipe.model.dtype)
    if is_hub_id(source):
        architecture = find(source)
        if architecture is None or architecture.pipeline not in FAMILIES:
            remedy = "give a folder with its configs; those that are known: stepdistill ls models"
            raise UserError(f"model.source {source}: its architecture is not known here; {remedy}")
        pipe = build_pipeline(architecture, dtype)
        return FAMILIES[architecture.pipeline](pipe, recipe.data.size, recipe.data.frames), architecture.prompt
    try:
        pipe = open_folder(embedded_models().get(source, Path(source)), dtype)
    except UserError:
        raise
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"model.source {source}: its configs cannot be read ({error}); save the pipeline anew") from None
    if type(pipe).__name__ not in FAMILIES:
        raise UserError(f"model.source {source}: no family is written for a {type(pipe).__name__}, so it cannot be planned")
    family = FAMILIES[type(pipe).__name__](pipe, recipe.data.size, recipe.data.frames)
    return family, prompt_shapes(family)


def prompt_shapes(family: Family) -> dict[str, tuple[int, ...]]:
    """What a prompt is encoded to; where that takes numbers, as for the known models of this pipeline."""
    try:
        return {name: tuple(x.shape[1:]) for name, x in family.encode_prompts(["a prompt"]).items()}
    except (RuntimeError, NotImplementedError) as error:
        same = [one.prompt for one in known().values() if one.pipeline == family.pipeline]
        if not same:
            raise UserError(f"no {family.pipeline} is known, and its prompts cannot be encoded without weights") from error
        return same[0]


def open_costs(recipe: Recipe, family: Family, prompt: dict[str, tuple[int, ...]], live: LiveBytes) -> tuple[Costs, nn.Module]:
    """The real network with one role on it, ready to be measured."""
    lora, train = recipe.lora, recipe.train
    roles = build_roles(family, ("student",), lora and lora.rank, lora and lora.targets)
    net = roles.student.net
    if train.checkpointing:
        enable_checkpointing(net)
    dtype = getattr(torch, recipe.model.dtype)
    cond = {name: encoded(name, shape, dtype) for name, shape in prompt.items()}
    precision = torch.bfloat16 if train.precision == "bf16" else None
    return Costs(family, roles.student, cond, live, precision), net


def encoded(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """One row of a prompt without numbers; a mask has them, for a network may count its tokens: all of them."""
    if name == "mask":
        return torch.ones(1, *shape, dtype=torch.bool)
    return torch.empty(1, *shape, dtype=dtype, device=HOST)


@torch.no_grad()
def decoding(family: Family, rows: int, live: LiveBytes) -> int:
    """The most bytes that come and go while `rows` samples become pictures."""
    latents = torch.empty(rows, *family.shape, device=HOST)
    live.hold(family.pipe.vae.parameters())
    live.lap()
    before = live.now
    with tiled(family.pipe.vae, family.size):
        family.decode(latents)
    return live.lap() - before


def options(plan: Plan, costs: Costs) -> list[tuple[str, int]]:
    """Changes that save memory, what costs least first, each with its gain if it is made alone."""
    recipe, found = plan.recipe, []
    train, rows = recipe.train, recipe.train.batch // recipe.train.accumulate
    most = max(plan.players.values(), default=0)
    if not train.checkpointing:
        enable_checkpointing(costs.student.net)
        with costs.live:
            leaner = costs.measure(rows, True)
        before = costs(rows, True)
        found.append(("train.checkpointing=true", max(before.forward, before.backward) - max(leaner.forward, leaner.backward)))
    if rows > 1:
        found.append((f"train.accumulate={train.batch}", most - most // rows))
    if recipe.eval.batch > 1:
        found.append(("eval.batch=1", plan.decode - plan.decode // recipe.eval.batch))
    if recipe.model.dtype == "float32":
        found.append(("model.dtype=bfloat16 train.precision=bf16", plan.base // 2))
    if MOMENTS[recipe.optim.optimizer] == 8:
        found.append(("optim.optimizer=adamw8bit", round(plan.optimizer * (1 - MOMENTS["adamw8bit"] / 8))))
    if recipe.lora and not recipe.model.quantize:
        net = costs.family.net
        with_lora = 4 * plan.size
        found += [(f"model.quantize={kind}", plan.base - weigh(net, kind) + with_lora) for kind in WEIGHT]
    if recipe.lora and recipe.lora.rank > 16:
        share = 1 - 16 / recipe.lora.rank
        found.append(("lora.rank=16", round((plan.adapters + plan.gradients + plan.optimizer) * share)))
    return found
