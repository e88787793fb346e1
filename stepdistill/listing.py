"""What there is to choose from, found without importing any of it."""

from __future__ import annotations

import ast
import importlib.util
import json
from pathlib import Path

from .errors import UserError
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
    if Path(path_or_name).is_file():
        return Path(path_or_name)
    if str(path_or_name) in have:
        return have[str(path_or_name)]
    near = suggestion(Path(path_or_name).stem, have) or f"; shipped are {', '.join(have)}"
    raise UserError(f"{path_or_name}: neither a file (seen from {Path.cwd()}) nor a shipped recipe{near}")


def recipes() -> dict[str, str]:
    """Shipped recipes, each with the first line of its header."""
    return {name: file.read_text(encoding="utf-8").splitlines()[0].lstrip("# ") for name, file in shipped().items()}


def registry(folder: Path) -> dict[str, str]:
    """The keys of the literal dict in folder/__init__.py, each with the first line of its class's module."""
    tree = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
    homes = {name.name: item.module for item in tree.body if isinstance(item, ast.ImportFrom) for name in item.names}
    table = next(node for node in ast.walk(tree) if isinstance(node, ast.Dict))
    found = {}
    for key, value in zip(table.keys, table.values, strict=True):
        source = (folder / f"{homes[value.id]}.py").read_text(encoding="utf-8")
        found[key.value] = (ast.get_docstring(ast.parse(source)) or "").split("\n")[0]
    return found


def models() -> dict[str, str]:
    """Embedded teachers, each with its pipeline class and its size on disk."""
    found = {}
    for name, folder in embedded_models().items():
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
        kind = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
        found[name] = f"{kind}, {size:.1f} MB"
    return found


SHELVES = {
    "recipes": recipes,
    "strategies": lambda: registry(HERE / "strategies"),
    "families": lambda: registry(HERE / "families"),
    "models": models,
}
