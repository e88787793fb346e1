"""Distil diffusers pipelines to a few steps, and export LoRA files that stock diffusers loads."""

import importlib

__version__ = "0.1.0"

_HOMES = {  # imported when first used, so that `import stepdistill` takes no time
    "FAMILIES": "families",
    "STRATEGIES": "strategies",
    "load_pipeline": "serve",
    "load_recipe": "recipe",
    "train": "runs",
}
__all__ = ["FAMILIES", "STRATEGIES", "__version__", "load_pipeline", "load_recipe", "train"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
