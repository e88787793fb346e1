"""Teacher, student, fake score and their averages: one network seen through several LoRA adapters, or whole copies.

The only module that knows PEFT. A role is a callable, `Denoiser`; strategies see nothing else. PEFT takes seconds to import,
and whoever checks a recipe imports this module for its names alone: so it is imported where adapters are met.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import distributed
from .batch import seed_of
from .diffusion import Prediction, anchored, guide, halves, mix, read, transition
from .errors import UserError
from .schedules import Schedule

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer

    from .families.base import Family


def lora_layers(module: nn.Module) -> Iterator[BaseTunerLayer]:
    """The layers of module that wear adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return (m for m in module.modules() if isinstance(m, BaseTunerLayer))


class wearing:
    """Run module with exactly one adapter active, or (None) as the bare base; what was worn before comes back on exit.

    PEFT's own `set_adapter` also flips requires_grad, and a leaf whose requires_grad is off when backward runs loses
    its gradient without a word. So this sets the two flags that a layer's forward reads, and nothing else. It can be
    entered again after it was left: each backward pass through one checkpointed forward does so.
    """

    def __init__(self, module: nn.Module, adapter: str | None):
        self.layers = list(lora_layers(module))
        self.adapter, self.active = adapter, [] if adapter is None else [adapter]

    def __enter__(self) -> None:
        self.before = [(m._disable_adapters, m._active_adapter) for m in self.layers]
        for m in self.layers:
            m._disable_adapters, m._active_adapter = self.adapter is None, self.active

    def __exit__(self, *_exception: object) -> None:
        for m, (disabled, active) in zip(self.layers, self.before, strict=True):
            m._disable_adapters, m._active_adapter = disabled, active


def worn(module: nn.Module) -> str | None:
    """The adapter that module is wearing; None for the bare base, and for a module without LoRA layers."""
    m = next(lora_layers(module), None)
    return None if m is None or m._disable_adapters else m._active_adapter[0]


def enable_checkpointing(net: nn.Module) -> None:
    """Activation checkpointing that replays every block in the adapter it first wore.

    Backward runs after the role has changed: a plain replay would recompute the student's blocks as somebody else and
    return wrong gradients, silently, since all adapters have the same shapes.

    Raises:
        UserError: diffusers cannot replay the blocks of this network.
    """
    if not getattr(net, "_supports_gradient_checkpointing", True):
        raise UserError(
            f"train.checkpointing true: diffusers' {type(net).__name__} cannot recompute its blocks; set it to false, and "
            f"train.accumulate higher for less memory"
        )

    def run(block: nn.Module, *args):
        adapter = worn(block)
        return checkpoint(
            block.__call__, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), wearing(block, adapter))
        )

    net.enable_gradient_checkpointing(run)


@dataclass(frozen=True)
class Denoiser:
    """One role: a family's network through one adapter, a whole copy of it, or (neither) the frozen base, the teacher."""

    family: Family
    net: nn.Module
    adapter: str | None = None
    whole: bool = False  # net is this role's own copy
    precision: torch.dtype | None = None  # autocast the network to it; None: run it as it is stored

    @property
    def kind(self) -> str:
        """What the network predicts: eps, x0, v or flow."""
        return self.family.kind

    @property
    def width(self) -> int:
        """Channels C of `features`."""
        return self.family.feature_width(self.net)

    def __call__(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor], told: Tensor | None = None) -> Prediction:
        """x_t [B, ...] at times t [B] in [0, 1], cond batch-first -> a Prediction in at least float32.

        `told` [B] is the time that the network hears, if it is not t.
        """
        autocast = nullcontext() if self.precision is None else torch.autocast(x_t.device.type, self.precision)
        with wearing(self.net, self.adapter), autocast:
            raw = self.family.forward(self.net, x_t, t if told is None else told, cond)
        raw = raw.to(torch.promote_types(raw.dtype, torch.float32))  # x0 from eps amplifies errors 14.6 times at t = 1
        return read(self.kind, raw, x_t.to(raw.dtype), *self.family.schedule.alpha_sigma(t.to(raw.dtype)))

    def guided(
        self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor], null: dict[str, Tensor] | None, scale: float | Tensor
    ) -> Prediction:
        """Classifier-free guidance at `scale` (a number or [B]; 1 is unguided and needs no null), in one forward.

        Raises:
            ValueError: the scale is not 1 and null is None (a guidance-distilled teacher).
        """
        plain = null is None and bool((scale == 1).all()) if isinstance(scale, Tensor) else scale == 1
        if plain:
            return self(x_t, t, cond)
        return guide(*self.pair(x_t, t, cond, null), scale)

    def pair(
        self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor], null: dict[str, Tensor] | None
    ) -> tuple[Prediction, Prediction]:
        """Conditional and unconditional predictions, of which guidance is made, in one forward; shapes as in a call.

        Raises:
            ValueError: null is None (a guidance-distilled teacher).
        """
        if null is None:
            raise ValueError(
                "guidance other than 1 needs an unconditional prediction, but this teacher has none (its guidance is "
                "distilled); set guidance to 1"
            )
        both = {name: torch.cat([cond[name], null[name]]) for name in null}
        return halves(self(torch.cat([x_t, x_t]), torch.cat([t, t]), both))

    def features(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> tuple[Prediction, Tensor]:
        """The prediction, and the tokens [B, L, C] of the block that the family names for discriminators."""
        kept: list[Tensor] = []
        block = self.family.feature_block(self.net)
        handle = block.register_forward_hook(lambda _module, _args, out: kept.append(out))
        try:
            prediction = self(x_t, t, cond)
        finally:
            handle.remove()
        return prediction, self.family.feature_tokens(kept[0], x_t, cond).to(prediction.x0.dtype)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """What training this role may change, by its name in the network; nothing for the teacher."""
        if self.whole:
            return dict(self.net.named_parameters())
        mark = f".{self.adapter}."
        return {name.replace(mark, "."): p for name, p in self.net.named_parameters() if mark in name}

    def parameters(self) -> list[nn.Parameter]:
        return list(self.named_parameters().values())

    @torch.no_grad()
    def follow(self, other: Denoiser, decay: float = 0.0) -> None:
        """Move towards another role: an exponential moving average, or (decay 0) a copy."""
        mine, theirs = (list(map(distributed.local, role.parameters())) for role in (self, other))
        torch._foreach_lerp_(mine, theirs, 1 - decay)

    @torch.no_grad()
    def reset(self) -> None:
        """Become equal to the teacher again."""
        base = dict(self.family.net.named_parameters())
        for name, p in self.named_parameters().items():
            if self.whole:
                distributed.fill(p, distributed.whole(base[name])) if name in base else p.zero_()
            elif "lora_B" in name:
                p.zero_()


class Roles(dict[str, Denoiser]):
    """The roles by name, also as attributes, and the process they share."""

    def __init__(self, family: Family, **roles: Denoiser):
        super().__init__(roles)
        self._family = family

    def __getattr__(self, name: str) -> Denoiser:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"role {name!r} is not one of {', '.join(self)}") from None

    @property
    def schedule(self) -> Schedule:
        return self._family.schedule

    def noise(self, x: Tensor, t: Tensor, eps: Tensor, since: Tensor | None = None) -> Tensor:
        """A sample of q(x_t | x_since) made with eps; x [B, ...] is clean if since is None. Times [B]."""
        return mix(x, eps, *self.transition(t, since))

    def transition(self, t: Tensor, since: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Coefficients [B] of q(x_t | x_since); of q(x_t | x_0) if since is None."""
        return transition(self._coefficients(since, t), self.schedule.alpha_sigma(t))

    def denoising_target(self, x: Tensor, t: Tensor, eps: Tensor, since: Tensor | None = None) -> Prediction:
        """What a denoiser must predict of `noise(x, t, eps, since)` to learn the score of all such samples at t."""
        return anchored(x, eps, self._coefficients(since, t), self.schedule.alpha_sigma(t))

    def _coefficients(self, since: Tensor | None, t: Tensor) -> tuple[Tensor, Tensor]:
        return (torch.ones_like(t), torch.zeros_like(t)) if since is None else self.schedule.alpha_sigma(since)

    def move(self, p: Prediction, t: Tensor) -> Tensor:
        """The deterministic first-order step to times t [B]: DDIM on variance-preserving schedules, Euler on flow."""
        return mix(p.x0, p.eps, *self.schedule.alpha_sigma(t))

    def decode(self, x0: Tensor) -> Tensor:
        """Latents -> pixels [B, 3, H, W] in [-1, 1], with gradient."""
        return self._family.decode(x0)

    def swap(self, **roles: Denoiser) -> Roles:
        """The same roles with some played by others: swap(student=roles["student_ema"])."""
        return Roles(self._family, **{**self, **roles})


def build_roles(
    family: Family,
    names: Iterable[str],
    rank: int | None,
    targets: Iterable[str] | None = None,
    seed: int = 0,
    precision: torch.dtype | None = None,
    embed_guidance: bool = False,
) -> Roles:
    """The teacher, and one role for each name: a LoRA on the shared base, or (rank None) a whole copy in float32.

    All start equal to the teacher. Nothing requires grad yet; the trainer opens what its players train.

    Raises:
        ValueError: embed_guidance with LoRA (the base would have to change).
    """
    from peft import LoraConfig, inject_adapter_in_model

    base = family.net.requires_grad_(False)
    if embed_guidance and rank is not None:
        raise ValueError("embed_guidance gives the network a new input, which a LoRA cannot carry; set lora to null")
    roles = Roles(family, teacher=Denoiser(family, base, precision=precision))
    for name in names:
        if rank is None:
            net = copy.deepcopy(base).float()
            if embed_guidance:
                family.add_guidance_embedding(net)
            roles[name] = Denoiser(family, net.requires_grad_(False), whole=True, precision=precision)
        else:
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets or family.lora_targets))
            with torch.random.fork_rng(), warnings.catch_warnings():
                torch.manual_seed(seed_of(seed, name))
                warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are the idea
                inject_adapter_in_model(config, base, name)
            roles[name] = Denoiser(family, base, name, precision=precision)
    for p in base.parameters():
        p.requires_grad_(False)
    for m in lora_layers(base):
        m._disable_adapters, m._active_adapter = True, []
    family.arrange()  # PEFT's convolutions are not
    for role in roles.values():
        for p in role.parameters():
            p.data = p.data.float()  # on a bf16 base PEFT makes bf16 adapters, whose small updates round to nothing
    return roles


def wear_lora(net: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put a LoRA, of alpha equal to its rank, on a network for good, by the names that `Denoiser.named_parameters` gives."""
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    layers = sorted({name.split(".lora_")[0] for name in weights})
    rank = weights[f"{layers[0]}.lora_A.weight"].shape[0]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers), net)
    set_peft_model_state_dict(net, dict(weights))


def fold_lora(net: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Add a LoRA to the weights of a network, which afterwards is one without."""
    wear_lora(net, weights)
    worn = set(lora_layers(net))
    for name, layer in [(name, m) for name, m in net.named_modules() if m in worn]:
        layer.merge()
        net.set_submodule(name, layer.get_base_layer())
