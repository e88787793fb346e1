"""From a recipe to the things that it names: family, strategy, roles; and their weights from a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from . import checkpoint, distributed
from .batch import seed_of
from .errors import UserError
from .export_weights import form_of, student_weights
from .families.base import Family
from .families.kernels import use_xformers
from .families.load import load_family
from .lora_sources import find_lora
from .recipe import Recipe, from_tree, load_recipe, strategy_name
from .roles import Roles, build_roles
from .sampling import Inference
from .sections import check_guidance
from .show import Line
from .sidecar import SIDECAR, WHOLE, Serving, read_export
from .sources import is_hub_id
from .strategies import Strategy

AVERAGE = "_ema"  # the average of role x is role x_ema


@dataclass(frozen=True)
class Distillation:
    """One recipe, loaded: what trains, samples, is evaluated and exported."""

    recipe: Recipe
    family: Family
    strategy: Strategy
    roles: Roles
    known: tuple[int, ...] | None = None  # the only numbers of steps in which its students can be sampled; None: no such limit
    together: bool = False  # its networks are in shares, so that they run when all processes run them, and never else

    def parameters(self) -> dict[str, nn.Parameter]:
        """All that may ever be trained, named as in `tensors`."""
        roles = {f"roles/{who}/{name}": p for who, role in self.roles.items() for name, p in role.named_parameters().items()}
        modules = self.strategy.modules().items()
        return roles | {f"modules/{key}/{name}": p for key, module in modules for name, p in module.named_parameters()}

    def tensors(self) -> dict[str, Tensor]:
        """All weights that training may change, by name: roles/student/..., modules/head/..."""
        roles = {f"roles/{who}/{name}": p for who, role in self.roles.items() for name, p in role.named_parameters().items()}
        modules = {
            f"modules/{key}/{name}": x
            for key, module in self.strategy.modules().items()
            for name, x in module.state_dict().items()
        }
        return roles | modules

    @torch.no_grad()
    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Copy saved weights in.

        Raises:
            UserError: they are of other names or shapes than this recipe's.
        """
        for name, p in self.tensors().items():
            x = saved.get(name)  # read from the disk at each asking
            if x is None or x.shape != p.shape:
                raise UserError(
                    f"the checkpoint has no {name} of shape {list(p.shape)}: it belongs to another recipe; train into "
                    f"another folder with --output, or start over with --resume never"
                )
            distributed.fill(p, x)

    def students(self) -> Roles:
        """The roles as they are sampled: averages stand in for what they average."""
        averaged = {name.removesuffix(AVERAGE): role for name, role in self.roles.items() if name.endswith(AVERAGE)}
        return self.roles.swap(**averaged)

    @property
    def counts(self) -> list[int]:
        """The numbers of steps in which the student is shown and measured, falling."""
        asked = self.recipe.eval.steps
        if asked is None:
            schedule = self.roles.schedule
            asked = {len(self.strategy.inference(schedule).hops)}
            for steps in (4, 2, 1):
                with suppress(ValueError):
                    self.strategy.inference(schedule, steps)
                    asked.add(steps)
        if self.known is not None:
            asked = set(asked).intersection(self.known)
        return sorted(asked, reverse=True)

    def inference(self, steps: int | None = None) -> Inference:
        """How the student is sampled in that many steps (None: the strategy's own).

        Raises:
            UserError: this student cannot be sampled in that many.
        """
        if self.known is not None and steps not in (None, *self.known):
            allowed = ", ".join(map(str, self.known))
            raise UserError(f"this export of {self.recipe.name} is sampled in one of {allowed} steps, not in {steps}")
        try:
            return self.strategy.inference(self.roles.schedule, steps)
        except ValueError as error:
            raise UserError(str(error)) from None


def assemble(recipe: Recipe, shares: bool = False) -> Distillation:
    """Load the pipeline and make the roles that the strategy wants, all equal to the teacher.

    shares: networks are shared out among processes, if train.shard says so; else each has them whole.

    Raises:
        UserError: the pipeline is unknown and cannot be found out, its teacher cannot be guided as the strategy wants, or a
            LoRA of the recipe is not of it.
    """
    model, train, where = recipe.model, recipe.train, distributed.device()
    together = shares and train.shard is not None and distributed.world() > 1
    dtype, data = getattr(torch, model.dtype), recipe.data
    first_alone = distributed.in_turn() if is_hub_id(model.source) else nullcontext()
    with first_alone:  # the others find in the hub's cache what it has fetched
        family = load_family(
            model.source,
            dtype,
            model.revision,
            model.variant,
            model.quantize,
            "cpu" if together else where,  # what is sharded goes to the device in parts
            data.size,
            data.frames,
            [find_lora(lora) for lora in model.loras],
            recipe.trust_remote_code,
        )
    if train.attention == "xformers":
        use_xformers(family)
    strategy = recipe.strategy
    for keys, message in check_guidance(family, strategy, recipe.pairs.guidance):
        raise UserError(f"{'.'.join(keys)}: {message}")
    check_pictures(family, recipe)
    averaged = [name for name in trained(strategy) if train.ema is not None]
    roles = build_roles(
        family,
        (*strategy.roles, *(name + AVERAGE for name in averaged)),
        rank=recipe.lora.rank if recipe.lora else None,
        targets=recipe.lora.targets if recipe.lora else None,
        seed=train.seed,
        precision=torch.bfloat16 if train.precision == "bf16" else None,
        embed_guidance=strategy.inference(family.schedule).guidance is not None,
    )
    for name in averaged:
        roles[name + AVERAGE].follow(roles[name])
    if together:
        share_out(family, roles, train.shard, where)
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(train.seed, "setup"))
        strategy.setup(roles)
    for module in strategy.modules().values():
        module.to(where)
    return Distillation(recipe, family, strategy, roles, together=together)


def share_out(family: Family, roles: Roles, how: str, where: torch.device) -> None:
    """Shard the networks of all roles, and put what is not sharded on the device. Adapters stay whole: they are small."""
    from .sharding import make_mesh, shard  # a second of imports, which one process is spared

    mesh = make_mesh(how)
    nets = {id(role.net): role.net for role in roles.values()}.values()
    adapters = [p for role in roles.values() if not role.whole for p in role.parameters()]
    for net in nets:
        shard(net, mesh, family.feature_block(net), adapters)
        net.to(where)
    family.pipe.to(where)


def check_pictures(family: Family, recipe: Recipe) -> None:
    """Raises UserError where a strategy learns from pictures, but the pipeline makes videos of several frames."""
    if "x0" in recipe.strategy.needs and family.frames not in (None, 1):
        raise UserError(
            f"data.frames {family.frames}: strategy {strategy_name(recipe.strategy)} learns from data.images, which are videos "
            f"of one frame; set data.frames to 1, or choose a strategy that learns from prompts alone, as dmd2 and rcm do"
        )


def trained(strategy: Strategy) -> list[str]:
    """Roles that are trained to be sampled: those that deserve an average."""
    return [name for name in strategy.roles if name.startswith("student")]


def restore(folder: Path) -> Distillation:
    """What can be sampled and measured in a folder: a run as its newest checkpoint left it, or an export, wherever it lies.

    Raises:
        UserError: it is neither, the run has no checkpoint yet, or see `restore_export`.
    """
    export = not (folder / "recipe.yaml").is_file() and (folder / SIDECAR).is_file()
    return restore_export(folder) if export else restore_run(folder)


def restore_run(run: Path, step: int | None = None) -> Distillation:
    """A run as its checkpoint of a step left it; None: its newest whole one.

    Raises:
        UserError: the folder is no run, or has no such checkpoint, or none that is whole.
    """
    if not (run / "recipe.yaml").is_file():
        raise UserError(f"{run} is not a run folder: it has no recipe.yaml; give the folder that `stepdistill train` wrote")
    newest = distributed.at_first(lambda: checkpoint.newest(run / "checkpoints", Line().say))
    if newest is None:
        raise UserError(f"{run} has no checkpoint yet; train it first: stepdistill train {run / 'recipe.yaml'}")
    if step is not None:
        there = checkpoint.steps(run / "checkpoints")
        if step not in there:
            raise UserError(f"{run} has no checkpoint of step {step}; it has {', '.join(map(str, there))}")
        newest = checkpoint.check(newest.with_name(f"{step:06d}"))
    saved, _ = checkpoint.load(newest)  # opened now: a training that goes on may remove it
    loaded = assemble(load_recipe(run / "recipe.yaml", data=False))
    loaded.load(saved)
    return loaded


@torch.no_grad()
def restore_export(folder: Path) -> Distillation:
    """The teacher, and the students of an export, from its files alone; they make the pictures that the trainer's made.

    What only training needs, critics and heads, is as it was in the beginning. Students who share out the experts of a pipeline
    are sampled in the numbers of steps of the sidecar alone: of each there is only the expert that it then plays.

    Raises:
        UserError: its files are in kohya's spelling alone, or not those of its recipe; its strategy is another package's; or
            the recipe is of another version of stepdistill.
    """
    told = read_export(folder)
    form = form_of(folder, told)
    if told.recipe.get("trust_remote_code"):
        raise UserError(
            f"{folder} was made by {told.strategy}, code of another package, which an export, from wherever it comes, does not "
            f"get imported; give the run folder"
        )
    made = assemble(recipe_of(told, folder / SIDECAR, whole=form in WHOLE))
    found = student_weights(folder, told, form, made.family)
    for student, weights in found.items():
        for role in (made.roles[name] for name in (student, student + AVERAGE) if name in made.roles):
            parts = tuple(made.family.networks[network] for who, network in told.worn if who == student)
            parameters = {name: p for name, p in role.named_parameters().items() if name.startswith(parts)}
            if off := sorted(parameters.keys() ^ weights.keys()):
                raise UserError(f"{folder}: files and recipe do not agree about {off[0]}; export the run again")
            for name, x in weights.items():
                if x.shape != parameters[name].shape:  # copy_ would stretch some
                    raise UserError(f"{folder}: files and recipe do not agree about the shape of {name}; export the run again")
                distributed.fill(parameters[name], x)
    shared_out = len(told.worn) < len(found) * len(made.family.networks)
    return dataclasses.replace(made, known=tuple(told.samplers)) if shared_out else made


def recipe_of(told: Serving, file: Path, whole: bool) -> Recipe:
    """The recipe of an export, whose sidecar is `file`; whole: its students are whole copies, however they were trained."""
    keys = ("revision", "variant", "dtype", "quantize")
    model = {"source": told.model, "loras": [f"{lora}@{lora.scale!r}" for lora in told.loras]}
    model |= {key: getattr(told, key) for key in keys}
    return from_tree({**told.recipe, "name": told.name, "model": model} | ({"lora": None} if whole else {}), file)


def modules_of(strategy: Strategy, roles: Roles, names: tuple[str, ...]) -> list[nn.Parameter]:
    """Parameters of the named roles and modules, as `Strategy.players` names them."""
    modules = strategy.modules()
    return [p for name in names for p in (roles[name] if name in roles else modules[name]).parameters()]
