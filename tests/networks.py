"""Tiny networks of many families, in float64, with a LoRA that is on: for what must hold for any network of diffusers."""

from __future__ import annotations

import diffusers
import peft
import pipelines
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from worlds import F64

from stepdistill.families import FAMILIES
from stepdistill.roles import build_roles


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


class Promoted(TorchFunctionMode):
    """Networks cast times and norms to float32, which would hide what is tested: float64 in its place."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is Tensor.float:
            return args[0].double()
        args = tuple(F64 if x is torch.float32 else x for x in args)
        return function(*args, **{key: F64 if x is torch.float32 else x for key, x in (kwargs or {}).items()})


def of_family(pipe, side=16):
    """The student of a pipeline's family: a function of x_t and t, and the shape of pictures with so many pixels a side."""
    family = FAMILIES[type(pipe).__name__](pipe)
    roles = build_roles(family, ("student",), rank=4)
    told = family.encode_prompts(["a red cat", "a dog"])
    cond = {name: x.double() if x.is_floating_point() else x for name, x in told.items()}
    stir(family.net)
    return family.net, lambda x, t: roles.student(x, t, cond).flow, family.latent_shape(side, side)


def alone(net: nn.Module, shape: tuple[int, ...], noise: float = 1000, **call):
    """A network without a family, that calls noise's time so, with a LoRA that PEFT wears by itself."""
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v"]), net)
    stir(net)
    return net, lambda x, t: net(x, timestep=noise * t, **call).sample, shape


@torch.no_grad()
def stir(net: nn.Module) -> None:
    """To float64 and evaluation; LoRA and all that starts at zero gets values of its own."""
    net.double().eval()
    for i, (name, p) in enumerate(net.named_parameters()):
        if "lora_B" in name or not p.any() or not p.isfinite().all():
            p.copy_(0.3 * normal(*p.shape, seed=i))


def text(tokens: int, width: int) -> Tensor:
    return normal(2, tokens, width, seed=8)


def lengths(tokens: int, dtype=torch.int64) -> Tensor:
    """Of the second prompt only a part counts."""
    return (torch.arange(tokens) < torch.tensor([[tokens], [tokens - 2]])).to(dtype)


def dit():
    net = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, sample_size=8,
        num_embeds_ada_norm=10,
    )  # fmt: skip
    return alone(net, (4, 8, 8), class_labels=torch.tensor([3, 7]))


def ltx():
    net = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16, num_layers=2,
        caption_channels=12,
    )  # fmt: skip
    call = {"encoder_hidden_states": text(6, 12), "encoder_attention_mask": lengths(6, F64)}
    return alone(net, (12, 8), num_frames=3, height=2, width=2, **call)


def cogvideox():
    net = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=4, text_embed_dim=12,
        num_layers=2, sample_width=4, sample_height=4, sample_frames=9, max_text_seq_length=6,
    )  # fmt: skip
    return alone(net, (3, 4, 4, 4), encoder_hidden_states=text(6, 12))


def hunyuan_video():
    net = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=1, patch_size_t=1, text_embed_dim=12, pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    call = {"encoder_hidden_states": text(6, 12), "encoder_attention_mask": lengths(6), "pooled_projections": normal(2, 8)}
    return alone(net, (4, 2, 3, 3), guidance=torch.full((2,), 6000.0, dtype=F64), **call)


NETWORKS = {
    "sd": lambda: of_family(pipelines.sd()),
    "sdxl": lambda: of_family(pipelines.sdxl()),
    "sd3": lambda: of_family(pipelines.sd3()),
    "flux": lambda: of_family(pipelines.flux()),
    "wan 2.2": lambda: of_family(pipelines.wan(boundary_ratio=0.6)),
    "pixart": lambda: of_family(pipelines.pixart()),
    "sana": lambda: of_family(pipelines.sana()),
    "qwen image": lambda: of_family(pipelines.qwen_image()),
    "z image": lambda: of_family(pipelines.z_image()),
    "lumina2": lambda: of_family(pipelines.lumina2(), 64),
    "dit": dit,
    "ltx": ltx,
    "cogvideox": cogvideox,
    "hunyuan video": hunyuan_video,
}


def build(name: str):
    """A network, a function of x_t and t (the same weights each time), and points and directions (x, t), (v, dt)."""
    torch.manual_seed(0)
    net, f, shape = NETWORKS[name]()
    t, dt = torch.tensor([0.4, 0.7], dtype=F64), torch.tensor([0.3, -0.2], dtype=F64)
    return net, f, (normal(2, *shape), t), (normal(2, *shape, seed=1), dt)


def exact(f, primals, tangents) -> tuple[Tensor, Tensor]:
    """What PyTorch says where attention is its own mathematics."""
    with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        return forward_ad.unpack_dual(f(*(forward_ad.make_dual(x, v) for x, v in zip(primals, tangents, strict=True))))
