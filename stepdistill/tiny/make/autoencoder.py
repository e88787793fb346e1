"""The autoencoder that both teachers share: 64x64 pictures to 12x8x8 latents of unit spread."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..judge import to_net
from ..world import Drawings
from .fit import fit, pictures

LATENTS = 12  # channels


def new_autoencoder() -> nn.Module:
    """Without attention: it learns mostly from crops, and works on whole pictures."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENTS,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=1.0,
        shift_factor=0.0,
        mid_block_add_attention=False,
    ).to(memory_format=torch.channels_last)


def make_autoencoder(work: Path, steps: int = 2000, crops: int = 96, wholes: int = 24) -> None:
    """Reconstruct crops around objects, and for the last third of the steps whole pictures; with a small KL term."""
    torch.manual_seed(0)
    net, (_, drawn) = new_autoencoder(), pictures(work)

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng([step, 3])
        x = to_net(some_crops(drawn, rng, crops) if step < 2 * steps // 3 else some_wholes(drawn, rng, wholes))
        posterior = net.encode(x).latent_dist
        y = net.decode(posterior.sample()).sample
        return unlikeness(y, x) + 5e-4 * posterior.kl().mean() / posterior.mean[0].numel()

    net = fit("autoencoder", net, loss, steps, 2e-3, work)
    with torch.no_grad():
        chunks = (to_net(drawn.images[i : i + 64]) for i in range(0, 2048, 64))
        whiten(net, torch.cat([net.encode(chunk).latent_dist.mean for chunk in chunks]))
    net.save_pretrained(work / "vae")


def make_decoder(work: Path, steps: int = 1200, crops: int = 64, wholes: int = 16) -> None:
    """Sharpen the decoder while the latents stay as they are."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(work / "vae").to(memory_format=torch.channels_last)
    decoder = nn.ModuleDict({"post_quant_conv": vae.post_quant_conv, "decoder": vae.decoder})
    decoder, (_, drawn) = copy.deepcopy(decoder), pictures(work)

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng([step, 4])
        x = to_net(some_crops(drawn, rng, crops) if step % 2 else some_wholes(drawn, rng, wholes))
        with torch.no_grad():
            z = vae.encode(x).latent_dist.mean
            z = z + 0.05 * torch.randn_like(z)  # teachers' samples are not exact either
        return unlikeness(decoder["decoder"](decoder["post_quant_conv"](z)), x)

    decoder = fit("decoder", decoder, loss, steps, 1.5e-3, work)
    vae.decoder.load_state_dict(decoder["decoder"].state_dict())
    vae.post_quant_conv.load_state_dict(decoder["post_quant_conv"].state_dict())
    vae.save_pretrained(work / "vae")


def unlikeness(y: Tensor, x: Tensor) -> Tensor:
    """Error of pictures y against x, [N, 3, H, W]: heavier where colours are (on objects), in pixels and differences."""
    weight, gap = 1 + 4 * (x.amax(1, keepdim=True) - x.amin(1, keepdim=True)), y - x
    edges = sum(torch.diff(gap, dim=d).abs().mean() for d in (2, 3))
    return (weight * (gap.abs() + 2 * gap.square())).mean() + edges


def some_wholes(drawn: Drawings, rng: np.random.Generator, n: int) -> np.ndarray:
    return drawn.images[np.sort(rng.integers(len(drawn.images), size=n))]


def some_crops(drawn: Drawings, rng: np.random.Generator, n: int) -> np.ndarray:
    return np.stack([crop(drawn, rng) for _ in range(n)])


def crop(drawn: Drawings, rng: np.random.Generator, side: int = 32) -> np.ndarray:
    """A square around some object, or (one in five) anywhere."""
    row = rng.integers(len(drawn.images))
    known = drawn.position[row][~np.isnan(drawn.position[row, :, 0])]
    centre = rng.uniform(0, 64, 2) if rng.random() < 0.2 else rng.choice(known) + rng.uniform(-8, 8, 2)
    x, y = np.clip(np.round(centre - side / 2), 0, 64 - side).astype(int)
    return drawn.images[row, y : y + side, x : x + side]


@torch.no_grad()
def whiten(net: nn.Module, latents: Tensor) -> None:
    """Fold mean and spread of each latent channel into the 1x1 convolutions, so that scaling_factor 1 is exact."""
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    before, after = net.quant_conv, net.post_quant_conv
    before.weight[:LATENTS] /= std[:, None, None, None]
    before.bias[:LATENTS] = (before.bias[:LATENTS] - mean) / std
    before.bias[LATENTS:] -= 2 * std.log()
    after.bias += after.weight[..., 0, 0] @ mean
    after.weight *= std[None, :, None, None]
