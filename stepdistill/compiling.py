"""torch.compile of the blocks that a network repeats, over all its roles."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

BACKEND = "inductor"  # of torch.compile
VARIANTS = 16  # of one block in one role: with and without gradient, of each input too, and for a few shapes


def compile_blocks(nets: Iterable[nn.Module], roles: int) -> None:
    """Compile each network's repeated blocks in place; so many roles play on them.

    A block is compiled anew for every role, since it wears another adapter, and for every grad mode. PyTorch allows 8 of that
    and then runs as written, with no more than a warning: here the limit follows from the roles, and beyond it is an error.
    Hooks that come later count too, since features of discriminators are read by one.
    """
    found = [block for net in nets for block in repeated_blocks(net)]
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, VARIANTS * (roles + 1) * len({structure(block) for block in found}))
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, config.recompile_limit)
    config.fail_on_recompile_limit_hit = True
    config.skip_nnmodule_hook_guards = False
    for block in found:
        block.compile(backend=BACKEND)


def repeated_blocks(net: nn.Module) -> list[nn.Module]:
    """What diffusers says that a network repeats, or else the members of its lists of modules; also of networks within it."""
    names = getattr(net, "_repeated_blocks", None)
    if names:
        return [module for module in net.modules() if type(module).__name__ in names]
    lists = [child for child in net.children() if isinstance(child, nn.ModuleList)]
    if lists:
        return [block for blocks in lists for block in blocks]
    return [block for child in net.children() for block in repeated_blocks(child)]


def structure(block: nn.Module) -> tuple:
    """Equal for blocks that can share what was compiled."""
    return type(block), tuple((name, p.shape) for name, p in block.named_parameters())
