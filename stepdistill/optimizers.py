"""The optimizers of a recipe, and their state as named tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import distributed
from .extras import require
from .sections import Optim


def build_optimizer(params: Sequence[nn.Parameter], optim: Optim) -> torch.optim.Optimizer:
    """A fresh one; whoever steps it sets its learning rate.

    adamw8bit is AdamW with moments in 8 bits, in blocks of 256, of all parameters with 4096 numbers or more. Dettmers et al.
    2021, arXiv:2110.02861.

    Raises:
        UserError: the package of that optimizer is not installed.
    """
    kinds = {kind: [p for p in params if distributed.sharded(p) == kind] for kind in (False, True)}
    groups = [{"params": kind} for kind in kinds.values() if kind]  # no operation takes both
    if optim.optimizer == "adamw":
        return torch.optim.AdamW(groups, betas=optim.betas, weight_decay=optim.weight_decay)
    require("bitsandbytes", "optim.optimizer adamw8bit")
    from bitsandbytes.optim import AdamW8bit

    for p in params:
        p.data = p.data.contiguous()  # as its first step does; later, state of another order than p's would be saved
    return AdamW8bit(params, betas=optim.betas, weight_decay=optim.weight_decay)


def moments(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> Iterator[tuple[str, Tensor]]:
    """All of an optimizer's state, by the name of its parameter and its own, as in roles/student/.../exp_avg; whole numbers are
    int64.

    names: of parameters, by their id.
    """
    of = names_in_order(optimizer, names)
    for i, state in optimizer.state_dict()["state"].items():
        for name, x in flat(state):
            yield (
                f"{of[i]}/{name}",
                torch.as_tensor(x).clone() if name.startswith("qmap") else torch.as_tensor(x),
            )  # all share it


def names_in_order(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> list[str]:
    """The name of each parameter, by its number in the optimizer."""
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def flat(state: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Tensors and numbers of a state, also of the dictionary within it that bitsandbytes makes."""
    for name, x in state.items():
        yield from flat(x) if isinstance(x, Mapping) else ((name, x),)


def load_moments(optimizer: torch.optim.Optimizer, names: Mapping[int, str], saved: Mapping[str, Tensor]) -> None:
    """Put back what `moments` gave, each tensor whole; where parameters are sharded, so is their state."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    number = {name: i for i, name in enumerate(names_in_order(optimizer, names))}
    state: dict[int, dict[str, Any]] = {}
    for key, x in saved.items():
        name, what = key.rsplit("/", 1)
        i = number[name]
        if x.dtype == torch.int64:
            x = x.item()
        elif distributed.sharded(params[i]) and x.shape == params[i].shape:
            whole, x = x, torch.zeros_like(params[i])
            distributed.fill(x, whole)
        state.setdefault(i, {})[what] = x
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
