"""Networks whose weights are shared out among processes (torch's FSDP2): who holds what, and what that communicates."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from . import distributed
from .compiling import repeated_blocks
from .errors import UserError


def make_mesh(how: str) -> DeviceMesh:
    """All processes in a row ("full"), or machines x the processes of each ("hybrid"): shards lie along the last axis.

    Raises:
        UserError: hybrid, and machines have different numbers of processes.
    """
    kind, world = distributed.device().type, distributed.world()
    if how == "full":
        return init_device_mesh(kind, (world,), mesh_dim_names=("shard",))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if distributed.anyone(world % local > 0 or local != distributed.told(local)):
        raise UserError(
            f"train.shard hybrid shards within machines of as many processes each, but this one has {local} of {world}; start "
            f"as many on each, or set train.shard to full"
        )
    return init_device_mesh(kind, (world // local, local), mesh_dim_names=("replicate", "shard"))


def shard(net: nn.Module, mesh: DeviceMesh, feature: nn.Module, kept: Iterable[nn.Parameter] = ()) -> None:
    """Share out a network's weights among the processes of a mesh, in place; each needs the whole network to begin with.

    Each of `parts` gathers its weights when it runs, there and back, and lets them go again. What is outside of all parts stays
    whole on every process: of the pipelines here 1 to 10 % of the weights. So the parts must be all that is ever in need of
    FSDP2's hooks, and whatever is read in between, as discriminators read `feature`, needs none. A part has one dtype: weights
    of others stay whole too.

    kept: parameters that stay whole in any case, such as adapters.
    """
    from torch.distributed.fsdp import fully_shard

    whole, taken = set(kept), set()
    for p in net.parameters():
        if not p.is_contiguous():
            p.data = p.data.contiguous()  # FSDP2 knows no other order
    for part in parts(net, feature):
        mine = [p for p in part.parameters() if p not in whole | taken]
        most = Counter()
        for p in mine:
            most[p.dtype] += p.numel()
        whole |= {p for p in mine if p.dtype != max(most, key=most.get)}
        taken |= {p for p in mine if p not in whole}
        fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    rest = {p for p in net.parameters() if p not in taken} | whole
    fully_shard(net, mesh=mesh, reshard_after_forward=True, ignored_params=rest)  # the root: it holds nothing, and leads


def parts(net: nn.Module, feature: nn.Module) -> list[nn.Module]:
    """What is sharded as one, inner ones first: the blocks that a network repeats, and the members of its lists, in which a
    UNet keeps them. None of them has `feature` within, whose output is used while the rest of that part is not."""
    found = {*repeated_blocks(net), *members(net)}
    found = {part for part in found if part is feature or all(module is not feature for module in part.modules())}
    return [module for module in reversed(list(net.modules())) if module in found]


def members(net: nn.Module) -> list[nn.Module]:
    """Of the outermost lists of modules in a network."""
    lists = [child for child in net.children() if isinstance(child, nn.ModuleList)]
    inner = [child for child in net.children() if not isinstance(child, nn.ModuleList)] if not lists else []
    return [block for blocks in lists for block in blocks] + [block for child in inner for block in members(child)]


@torch.no_grad()
def unsharded(net: nn.Module) -> nn.Module:
    """A network of diffusers, or experts, like a sharded one, whole, on the CPU. All processes ask."""
    from torch.distributed.fsdp import FSDPModule

    if hasattr(net, "rebuilt"):  # two experts in one
        return net.rebuilt(unsharded)
    kind = next(kind for kind in type(net).__mro__ if not issubclass(kind, FSDPModule))
    made, there = kind.from_config(net.config), net.state_dict()
    for name, x in made.state_dict().items():  # in its own order; one at a time is whole
        x.copy_(distributed.whole(there[name]))
    return made
