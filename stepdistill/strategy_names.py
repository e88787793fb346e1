"""Strategies by name: our own, and, where the user trusts them, classes of installed packages, `package.module:Class`."""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Iterator

from .errors import UserError
from .sources import suggestion
from .strategies import STRATEGIES, Strategy

TRUST = "set trust_remote_code: true at the top of the recipe (stepdistill explain: --trust-remote-code)"


def find_strategy(name: str, trusted: bool) -> type[Strategy]:
    """The class that a recipe names. What is not ours is imported only if it is `trusted`.

    Raises:
        UserError: no such strategy, a package that is not trusted or cannot be imported, or a class that is no strategy.
    """
    if name in STRATEGIES:
        return STRATEGIES[name]
    if ":" not in name:
        near = suggestion(name, STRATEGIES) or f"; there are {', '.join(STRATEGIES)}"
        raise UserError(f"unknown strategy {name}{near} (see: stepdistill ls strategies)")
    if not re.fullmatch(r"\w+(\.\w+)*:\w+", name):
        raise UserError(f"{name} must read package.module:Class, the class of an installed package")
    if not trusted:
        raise UserError(f"{name} is code of another package, imported only if you trust it: {TRUST}")
    return _strategy_class(name)


def _strategy_class(name: str) -> type[Strategy]:
    """The class package.module:Class, imported; raises UserError if it cannot serve."""
    home, _, class_name = name.partition(":")
    try:
        module = importlib.import_module(home)
    except Exception as error:  # whatever foreign code raises
        if isinstance(error, ModuleNotFoundError) and f"{home}.".startswith(f"{error.name}."):
            raise UserError(f"{name}: there is no module {error.name}; install its package beside stepdistill") from None
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{name}: importing {home} fails with {said}; to see where: python -c 'import {home}'") from error
    kind = getattr(module, class_name, None)
    if kind is None:
        near = suggestion(class_name, vars(module)) or "; name a class of that module"
        raise UserError(f"{name}: module {home} has no {class_name}{near}")
    for fault in _faults(kind):
        raise UserError(f"{name} is no strategy: {fault} (see docs/write_a_strategy.md)")
    return kind


def _faults(kind: object) -> Iterator[str]:
    """What keeps an object from being a strategy, each with its remedy."""
    if not isinstance(kind, type) or not issubclass(kind, Strategy):
        yield "it must be a class derived from stepdistill.strategies.Strategy"
    elif "__dataclass_fields__" not in vars(kind):  # inherited ones would hide its own fields
        yield "its fields are not declared; decorate it with @dataclass"
    else:
        for field in dataclasses.fields(kind):
            if field.name == "name":
                yield "its field name is the key that names the strategy; rename it"
            elif field.default is field.default_factory is dataclasses.MISSING:
                yield f"its field {field.name} has no default; give it one"
        for method in ("losses", "inference"):
            if getattr(kind, method) is getattr(Strategy, method):
                yield f"it has no method {method}; define one"


def strategy_name(strategy: Strategy) -> str:
    """The name by which `find_strategy` finds a strategy's class: that of the module that defines it, if it is not ours."""
    kind = type(strategy)
    return next((name for name, ours in STRATEGIES.items() if kind is ours), f"{kind.__module__}:{kind.__qualname__}")
