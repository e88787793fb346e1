"""Packages that only some recipes need: whether they are there, and which extra of stepdistill brings them."""

from __future__ import annotations

import importlib.util

from .errors import UserError

EXTRAS = {  # package: extra
    **dict.fromkeys(("torchao", "bitsandbytes"), "quantize"),
    "xformers": "xformers",
    **dict.fromkeys(("tensorboard", "wandb"), "track"),
}


def installed(package: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


def require(package: str, key: str) -> None:
    """Raises UserError, with the command that mends it, if the package that a recipe's key asks for is not there."""
    if not installed(package):
        raise UserError(
            f"{key} needs the package {package}, which is not installed; "
            f"install it: pip install 'stepdistill[{EXTRAS[package]}]'"
        )
