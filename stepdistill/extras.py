"""Packages that only some recipes and figures need: whether they are there, and which extra of stepdistill brings them."""

from __future__ import annotations

import importlib.util
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import UserError

EXTRAS = {  # package: extra
    **dict.fromkeys(("torchao", "bitsandbytes"), "quantize"),
    "xformers": "xformers",
    **dict.fromkeys(("tensorboard", "wandb"), "track"),
    **dict.fromkeys(("torch_fidelity", "open_clip"), "eval"),
    "lpips": "lpips",
    "ImageReward": "rewards",
}


def installed(package: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


def require(package: str, key: str) -> None:
    """Raises UserError, with the command that mends it, if the package that `key` asks for (of a recipe, or a figure) is not
    there."""
    if not installed(package):
        raise UserError(
            f"{key} needs the package {package}, which is not installed; "
            f"install it: pip install 'stepdistill[{EXTRAS[package]}]'"
        )


@contextmanager
def importing(package: str, key: str) -> Iterator[None]:
    """Around the import of a package that `key` needs.

    Raises:
        UserError: it is not installed, or does not import beside the versions of what it needs itself.
    """
    require(package, key)
    try:
        yield
    except (ImportError, AttributeError, RuntimeError, OSError) as error:
        why = textwrap.shorten(str(error), 160, placeholder=" ...")
        raise UserError(
            f"{key} needs the package {package}, which is installed but does not import ({why}); install versions of it, of "
            "torchvision and of transformers that were made for each other, or leave this figure out"
        ) from error
