"""What there is to choose from, found without importing any of it."""

from __future__ import annotations

import ast
import importlib.util
import json
from pathlib import Path
from typing import Any

from .architectures import known
from .errors import UserError, one_line
from .sources import embedded_models, suggestion

HERE = Path(__file__).parent


def shipped() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    package = importlib.util.find_spec("stepdistill_recipes")
    folder = Path(package.origin).parent if package else HERE.parent / "recipes"  # a clone that is not installed
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def find_recipe(path_or_name: str | Path) -> Path:
    """The file of a recipe, given as a path or as a shipped recipe's name.

    Raises:
        UserError: there is neither.
    """
    have = shipped()
    try:
        if Path(path_or_name).is_file():
            return Path(path_or_name)
    except (OSError, ValueError):  # a name that no file can have, or in a folder that is closed
        pass
    if str(path_or_name) in have:
        return have[str(path_or_name)]
    near = suggestion(Path(path_or_name).stem, have) or f"; shipped are {', '.join(have)}"
    raise UserError(f"{one_line(str(path_or_name))}: neither a file (seen from {Path.cwd()}) nor a shipped recipe{near}")


def recipes() -> dict[str, str]:
    """Shipped recipes, each with the first line of its header."""
    return {name: file.read_text(encoding="utf-8").splitlines()[0].lstrip("# ") for name, file in shipped().items()}


def registry(folder: Path) -> dict[str, tuple[str, Path]]:
    """The keys of the literal dict in folder/__init__.py, each with its class and the module that defines it."""
    tree = parsed(folder / "__init__.py")
    homes = siblings(tree, folder)
    table = next(node for node in ast.walk(tree) if isinstance(node, ast.Dict))
    return {key.value: (value.id, homes[value.id]) for key, value in zip(table.keys, table.values, strict=True)}


def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def siblings(tree: ast.Module, folder: Path) -> dict[str, Path]:
    """What a module imports from others of its folder, each name with its file."""
    imports = [item for item in tree.body if isinstance(item, ast.ImportFrom) and item.level == 1]
    return {name.name: folder / f"{item.module}.py" for item in imports for name in item.names}


def headline(file: Path) -> str:
    """The first line of a module's docstring."""
    return (ast.get_docstring(parsed(file)) or "").split("\n")[0]


def constants(name: str, file: Path) -> dict[str, Any]:
    """What a class has in its body, its parents' first: constants by name; of all else, the piece of syntax that it is."""
    tree = parsed(file)
    made = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    homes = {node.name: file for node in tree.body if isinstance(node, ast.ClassDef)} | siblings(tree, file.parent)
    found: dict[str, Any] = {}
    for parent in (base.id for base in reversed(made.bases) if base.id in homes):
        found |= constants(parent, homes[parent])
    for node in made.body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            found[target.id] = node.value.value if isinstance(node.value, ast.Constant) else node.value
    return found


def families() -> dict[str, str]:
    """Pipelines, each with what its students draw, its teacher's guidance, the LoRA files of its students, and its models."""
    found = {}
    for pipeline, (name, file) in registry(HERE / "families").items():
        of = constants(name, file)
        draws = "pictures" if of["frames"] is None else "videos"
        guidance = {True: "distilled guidance", False: "guided"}.get(of["guidance_distilled"], "guided or distilled")
        files = "diffusers" if of["kohya_prefix"] is None else "diffusers, kohya"
        found[pipeline] = f"{draws:<10}{guidance:<21}{files:<18}{headline(file).partition(':')[0]}"
    return found


def models() -> dict[str, str]:
    """Embedded teachers, with pipeline class and size on disk; known models of the hub, with the size of what is distilled."""
    found = {}
    for name, folder in embedded_models().items():
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
        kind = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
        found[name] = f"{kind}, {size:.1f} MB"
    for a in known().values():
        size = sum(part.parameters for part in a.denoisers.values()) / 1e9
        gated = ", gated" * a.gated
        found[a.hub[0]] = f"{size:.1f} B, {2 * a.parameters / 1e9:.0f} GB to download in 16 bits; {a.licence}{gated}"
    return found


SHELVES = {
    "recipes": recipes,
    "strategies": lambda: {name: headline(file) for name, (_, file) in registry(HERE / "strategies").items()},
    "families": families,
    "models": models,
}
