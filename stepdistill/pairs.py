"""Makes teacher pairs: noise, and where the guided teacher's deterministic solver takes it.

Every shard is a pure function of the settings and its number, so an interrupted job ends as an unbroken one does.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import distributed
from .assemble import Distillation, assemble
from .batch import seed_of
from .data.pairs import begin, noise_of, write_shard
from .data.prompts import read_prompts
from .data.texts import encode_texts
from .errors import UserError
from .lora_sources import identities
from .recipe import Recipe, strategy_name
from .sampling import Inference, sample, trailing
from .show import Line, clock
from .sources import identity, shards


def make(recipe: Recipe, out: Path | None = None) -> Path:
    """`stepdistill pairs RECIPE`: make or complete the folder `out`, or pairs.folder, or pairs/<name of the recipe>.

    Raises:
        UserError: the strategy needs no pairs, or the folder has some of other settings.
    """
    if "pairs" not in recipe.strategy.needs:
        raise UserError(f"strategy {strategy_name(recipe.strategy)} needs no pairs; train it: stepdistill train RECIPE")
    folder = Path(out or recipe.pairs.folder or Path("pairs") / recipe.name)
    make_pairs(assemble(recipe), folder, Line())
    return folder


def make_pairs(distillation: Distillation, folder: Path, line: Line) -> None:
    """Make the shards that a folder still lacks, each process its share of them.

    Raises:
        UserError: the folder has pairs of other settings.
        KeyboardInterrupt: the finished shards stay, and the next call goes on from there.
    """
    recipe, pairs = distillation.recipe, distillation.recipe.pairs
    prompts = read_prompts(recipe.data.prompts, recipe.data.count)
    prompts = [prompts[i % len(prompts)] for i in range(pairs.count)]
    made = settings(distillation, prompts)
    distributed.at_first(lambda: begin(folder, made))
    names = shards(made)
    missing = [k for k in range(len(names)) if not (folder / names[k]).is_file()]
    todo = distributed.share(missing, distillation.together)
    distributed.wait()  # each looked before anybody wrote
    parts = {k: range(k * pairs.shard, min((k + 1) * pairs.shard, pairs.count)) for k in todo}
    done = first = pairs.count - sum(map(len, parts.values()))
    began = time.monotonic()
    try:
        for k, part in parts.items():
            ends = []
            for i in range(0, len(part), pairs.batch):
                some = part[i : i + pairs.batch]
                ends.append(endpoints(distillation, noises(distillation, some), prompts[some.start : some.stop]))
                done += len(some)
                left = (time.monotonic() - began) / (done - first) * (pairs.count - done)
                line(f"pairs: {done}/{pairs.count}  {clock(left)} left", final=done == pairs.count)
            seeds = [seed_of_pair(pairs.seed, i) for i in part]
            if distributed.rank() == 0 or not distillation.together:
                some = prompts[part.start : part.stop]
                write_shard(folder / names[k], some, noises(distillation, part), torch.cat(ends), seeds)
    except KeyboardInterrupt:
        there = sum((folder / name).is_file() for name in names)
        line.say(f"stopped with {there} of {len(names)} files in {folder}. The same command goes on from there.")
        raise
    distributed.wait()


def settings(distillation: Distillation, prompts: list[str]) -> dict[str, Any]:
    """All that decides what the pairs are; prompts: one for each."""
    recipe, model, pairs = distillation.recipe, distillation.recipe.model, distillation.recipe.pairs
    loras = {"loras": identities(model.loras)} if model.loras else {}
    return loras | {
        "source": identity(model.source),
        "revision": model.revision,
        "variant": model.variant,
        "dtype": model.dtype,
        "quantize": model.quantize,
        "guidance": scale(recipe),
        "steps": pairs.steps,
        "resolution": list(distillation.family.size),
        "count": pairs.count,
        "shard": pairs.shard,
        "seed": pairs.seed,
        "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16],
    }


def scale(recipe: Recipe) -> float:
    """The teacher's guidance scale in pairs."""
    return recipe.strategy.guidance if recipe.pairs.guidance is None else recipe.pairs.guidance


def seed_of_pair(seed: int, index: int) -> int:
    """The seed of one pair's noise."""
    return seed_of(seed, "pair", index)


def noises(distillation: Distillation, which: range) -> Tensor:
    """The noise [n, ...] of these pairs, on the CPU."""
    seed, shape = distillation.recipe.pairs.seed, distillation.family.shape
    return torch.stack([noise_of(seed_of_pair(seed, i), shape) for i in which])


@torch.no_grad()
def endpoints(distillation: Distillation, noise: Tensor, prompts: list[str]) -> Tensor:
    """Where the teacher's ODE takes noise [n, ...]: clean latents [n, ...], on the CPU."""
    roles, family, recipe = distillation.roles, distillation.family, distillation.recipe
    hops = trailing(roles.schedule.grid(recipe.pairs.steps), "teacher", scale(recipe))
    where = distributed.device()
    cond = {name: x.to(where) for name, x in encode_texts(family, prompts).items()}
    null = family.null_prompts()
    null = null and {name: x.to(where).expand(len(noise), *x.shape[1:]) for name, x in null.items()}
    return sample(roles, Inference(hops, renoise=False), noise.to(where), cond, null=null).cpu()
