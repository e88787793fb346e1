"""Who may import whom (design: the house). Imports are read from the source, also those inside functions."""

import ast
from collections.abc import Iterable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import stepdistill

ROOT = Path(stepdistill.__file__).parent


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name below `stepdistill`; a package by its folder's."""
    files = {path.relative_to(ROOT).with_suffix("").parts: path for path in ROOT.rglob("*.py")}
    return {".".join(part for part in parts if part != "__init__"): path for parts, path in files.items()}


MODULES = modules()
MAKERS = {name for name in MODULES if name.startswith("tiny.make")}  # what made the embedded world

DOORS = {  # third-party package: the rooms that may import it
    "yaml": {"yaml_tree"},
    "peft": {"roles"},
    "accelerate": {"distributed", "trackers"},
    "diffusers": {"families", "samplers", "evaluate", "export", "serve", "meta", *MAKERS},
    "transformers": {"families", "evaluate", "meta", *MAKERS},
    "tensorboard": {"trackers"},
    "huggingface_hub": {"push", "families", "evaluate.weights", "surroundings"},
    "wandb": {"trackers"},
    "stepdistill_kernels": {"attention"},
    "triton": set(),  # kernels/ only
    "open_clip": {"evaluate.clip"},
    "lpips": {"perceptual"},
    "pyarrow": {"data.tables"},
    "torch_fidelity": {"evaluate.features"},
    "ImageReward": {"evaluate.rewards"},
    "torchao": {"families"},
    "bitsandbytes": {"optimizers"},
    "filelock": {"lock"},
    "torchmetrics": {"evaluate"},
    "jinja2": {"report"},
    "markupsafe": {"report"},
    "matplotlib": {"report"},
}
PIPELINES = {"families", "export", "serve", *MAKERS}  # rooms that may import a pipeline class from diffusers

NUMBERS = {"schedules", "diffusion", "losses", "batch", "attention", "derivatives"}  # pure maths
MODEL = NUMBERS | {"roles", "sampling", "distributed", "fields", "errors"}
MAY = {  # room: the other rooms that it may import; unlisted rooms are bound by NEVER and by the lack of circles
    **{room: NUMBERS for room in NUMBERS},
    "errors": set(),
    "watch": set(),
    "memory_advice": {"errors", "plan", "recipe"},
    "rescue": {"show", "checkpoint", "distributed", "errors", "memory_advice", "trainer", "watch"},
    "architectures": set(),
    "meta": {"architectures", "families", "foreign"},
    "compiling": set(),
    "machine": {"distributed", "errors", "extras", "sections", "trackers"},
    "devices": set(),
    "extras": {"errors"},
    "optimizers": {"distributed", "extras", "sections"},
    "sharding": {"compiling", "distributed", "errors"},
    "trackers": {"distributed", "errors", "extras", "files", "recipe", "sections", "show"},
    "live_bytes": set(),
    "as_cuda": set(),
    "costs": {"as_cuda", "live_bytes", "roles", "families"},
    "fields": set(),
    "foreign": {"errors", "fields"},
    "sources": {"architectures", "foreign"},
    "lora_sources": {"sources"},
    "kohya": set(),
    "merge": {"errors", "families", "files", "kohya", "lora_sources"},
    "listing": {"architectures", "errors", "sources"},
    "doctor": {"show", "sources", "surroundings"},
    "surroundings": {"machine"},
    "timing": set(),
    "communication": set(),
    "account": {"distributed", "errors", "files", "foreign", "show", "timing"},
    "checkpoint": {"distributed", "errors", "files", "foreign"},
    "files": set(),
    "lock": {"distributed", "errors"},
    "stopping": set(),
    "show": {"errors", "files"},
    "distributed": {"errors"},
    "sections": {"fields", "schedules", "sources", "lora_sources", "errors"},
    "strategy_names": {"errors", "sources", "strategies"},
    "yaml_tree": set(),
    "arguments": {"errors"},
    "recipe": {"yaml_tree", "errors", "fields", "listing", "sections", "sources", "families", "strategies", "strategy_names"},
    "roles": NUMBERS | {"distributed", "errors"},  # and families.base, for types only
    "sampling": NUMBERS | {"roles"},
    "perceptual": {"errors"},
    "sidecar": {"errors", "fields", "foreign", "lora_sources", "samplers", "sources"},
    "lora_files": {"sidecar"},
    "export_weights": {"errors", "families", "foreign", "lora_files", "sidecar"},
    "strategies": MODEL | {"perceptual"},
    "families": NUMBERS | {"distributed", "errors", "extras", "foreign", "sources", "lora_sources", "kohya", "fields"},
}
NEVER = {  # room: rooms that it must not import
    "trainer": {"evaluate", "export", "families", "tiny", "cli", "runs"},
    "data": {"roles", "strategies", "trainer", "evaluate", "export", "cli", "runs"},
    "evaluate": {"trainer", "cli", "runs"},
    "export": {"trainer", "cli", "runs"},
    "inference": {"trainer", "evaluate", "cli", "runs"},
    "serve": {"trainer", "evaluate", "export", "cli", "runs"},
    "stepwise": {"trainer", "export", "cli", "runs"},
    "report": {"trainer", "assemble", "serve", "export", "tiny", "cli", "runs"},  # it reads folders, and runs no network
}


def imports(name: str, source: str, package: bool = False) -> Iterator[tuple[str, str]]:
    """What a module imports when it runs: (module, imported name), those of stepdistill with a leading dot."""
    tree = ast.parse(source)
    types_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in types_only:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = name.split(".")
                up = here[: len(here) - node.level + package] if name else []
                base = "." + ".".join([*up, *filter(None, [base])])
            elif base.split(".")[0] == "stepdistill":
                base = base.removeprefix("stepdistill") or "."
            for alias in node.names:
                inner = f"{base}.{alias.name}" if base != "." else f".{alias.name}"
                yield (inner, "") if inner.removeprefix(".") in MODULES and base[0] == "." else (base, alias.name)


def room(module: str) -> str:
    return module.removeprefix(".").split(".")[0]


def allowed(module: str, rooms: set[str]) -> bool:
    return module in rooms or room(module) in rooms


def read_imports(name: str) -> list[tuple[str, str]]:
    """What a module of the package imports."""
    path = MODULES[name]
    return list(imports(name, path.read_text(encoding="utf-8"), path.name == "__init__.py"))


def breaches(name: str, targets: Iterable[tuple[str, str]]) -> list[str]:
    """The arrows that a module's imports break."""
    found = []
    for target, imported in targets:
        inside = target.startswith(".")
        here, there = room(name), room(target) if inside else target.split(".")[0]
        if not inside:
            there = "tensorboard" if target == "torch.utils.tensorboard" else there
            if there in DOORS and not allowed(name, DOORS[there]):
                found.append(f"{name} imports {there}: its door is {sorted(DOORS[there])}")
            if there == "diffusers" and imported.endswith("Pipeline") and not allowed(name, PIPELINES):
                found.append(f"{name} imports {imported}: pipelines belong to {sorted(PIPELINES)}")
        elif here != there and there and name not in MAKERS:
            if there not in MAY.get(here, {there}) or there in NEVER.get(here, ()):
                found.append(f"{name} imports {target}")
            if target.count(".") > 1 and there == "strategies" and target != ".strategies.base":
                found.append(f"{name} imports {target}: only STRATEGIES knows particular strategies")
            if target == ".tiny.judge" and here not in ("evaluate", "tiny"):
                found.append(f"{name} imports {target}: the judge never enters training")
            if {"cli": "__main__", "verbs": "cli"}.get(there, name) != name:
                found.append(f"{name} imports the command line")
    return found


@pytest.mark.parametrize("name", sorted(MODULES))
def test_arrows(name):
    assert breaches(name, read_imports(name)) == []


def test_no_circles_between_rooms():
    arrows: dict[str, set[str]] = {}
    for name in MODULES.keys() - MAKERS:
        targets = {room(target) for target, _ in read_imports(name) if target.startswith(".")}
        arrows.setdefault(room(name), set()).update(targets - {room(name), ""})
    assert "recipe" in arrows["data"]  # the graph is not empty
    list(TopologicalSorter(arrows).static_order())  # raises CycleError, which shows the circle


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("strategies.new", "from ..families.base import Family"),
        ("strategies.new", "import diffusers"),
        ("strategies.new", "def f():\n    from peft import LoraConfig"),
        ("strategies.new", "from ..recipe import Recipe"),
        ("strategies.new", "from stepdistill.trainer import Trainer"),
        ("families.new", "from ..roles import Roles"),
        ("families.new", "from .. import roles"),
        ("trainer", "import yaml"),
        ("trainer", "from .strategies.dmd2 import DMD2"),
        ("trainer", "from .tiny.judge import Judge"),
        ("data.new", "from ..tiny.judge import load_judge"),
        ("evaluate.new", "from diffusers import StableDiffusionPipeline"),
        ("roles", "from .families.base import Family"),
        ("recipe", "from .trainer import Trainer"),
        ("losses", "from .roles import Roles"),
        ("runs", "from .cli import main"),
        ("report.new", "from ..runs import Run"),
        ("evaluate.new", "from matplotlib.figure import Figure"),
    ],
)
def test_a_wrong_arrow_is_found(name, source):
    assert breaches(name, imports(name, source))


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("strategies.new", "from ..losses import surrogate\nfrom ..distributed import mean_over_ranks"),
        ("roles", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .families.base import Family"),
        ("families.new", "from diffusers import FluxPipeline"),
        ("evaluate.new", "from diffusers import DDIMScheduler\nfrom ..tiny.judge import load_judge"),
        ("yaml_tree", "import yaml"),
        ("recipe", "from .yaml_tree import shown\nfrom .strategies import STRATEGIES"),
    ],
)
def test_a_right_arrow_is_none(name, source):
    assert breaches(name, imports(name, source)) == []
