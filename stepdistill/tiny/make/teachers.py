"""The two teachers: what they see, their networks, their losses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..judge import to_net
from ..world import draw, scenes
from .autoencoder import LATENTS
from .fit import SEED_TEACH, fit
from .text import WIDTH, token_ids

CAPTIONED = 60_000  # pictures, encoded, that teachers train on
CELLS = 8  # side of the latents


def load_parts(work: Path):
    """The frozen autoencoder, tokenizer and text encoder that both teachers share: those of the work folder, or, to train
    a teacher beside those that ship, of the package."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    home = work if (work / "vae").is_dir() else Path(__file__).parents[1] / "tiny-sd"
    vae = AutoencoderKL.from_pretrained(home / "vae").float().to(memory_format=torch.channels_last)
    encoder = CLIPTextModelWithProjection.from_pretrained(home / "text_encoder").float()
    tokenizer = CLIPTokenizer.from_pretrained(home / "tokenizer")
    return vae.requires_grad_(False).eval(), tokenizer, encoder.requires_grad_(False).eval()


def make_latents(work: Path) -> None:
    """Encode the pictures that teachers see (posterior means, float16), with their captions' token ids."""
    vae, tokenizer, _ = load_parts(work)
    told = scenes(CAPTIONED, SEED_TEACH, "seen")
    latents = np.empty((CAPTIONED, LATENTS, CELLS, CELLS), np.float16)
    with torch.no_grad():
        for i in range(0, CAPTIONED, 512):
            # pictures are drawn in chunks with a seed each: draw() would hold them all
            images = draw(told[i : i + 512], SEED_TEACH * 1_000_000 + i).images
            latents[i : i + 512] = vae.encode(to_net(images)).latent_dist.mean.half().numpy()
            if i % 5120 == 0:
                print(f"latents {i}/{CAPTIONED}", flush=True)
    np.save(work / "latents.npy", latents)
    np.save(work / "ids.npy", token_ids(tokenizer, [scene.caption for scene in told]).numpy())


def teacher_batches(work: Path, batch: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """A function that draws a batch, one caption in ten empty: latents [batch, 12, 8, 8], token ids [batch, LENGTH]."""
    _, tokenizer, _ = load_parts(work)
    latents, ids = torch.from_numpy(np.load(work / "latents.npy")), torch.from_numpy(np.load(work / "ids.npy"))
    empty = token_ids(tokenizer, [""])

    def draw_batch() -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(latents), (batch,))
        return latents[rows].float(), torch.where(torch.rand(batch, 1) < 0.1, empty, ids[rows])

    return draw_batch


def new_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=CELLS,
        in_channels=LATENTS,
        out_channels=LATENTS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 128),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    ).to(memory_format=torch.channels_last)


def new_ddpm_scheduler():
    """Stable Diffusion's table, v prediction (arXiv:2202.00512), sampled at trailing timesteps."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )


def make_sd(work: Path, steps: int = 15500, batch: int = 64) -> None:
    """tiny-sd's UNet: mean squared error in v at uniform timesteps."""
    torch.manual_seed(2)
    net, draw_batch, (_, _, encoder) = new_unet(), teacher_batches(work, batch), load_parts(work)
    table = new_ddpm_scheduler().alphas_cumprod

    def loss(step: int) -> Tensor:
        x0, ids = draw_batch()
        text = encoder.text_model(ids).last_hidden_state
        t, eps = torch.randint(len(table), (batch,)), torch.randn_like(x0)
        alpha, sigma = (c.view(-1, 1, 1, 1) for c in (table[t].sqrt(), (1 - table[t]).sqrt()))
        x_t = (alpha * x0 + sigma * eps).contiguous(memory_format=torch.channels_last)
        return F.mse_loss(net(x_t, t, text).sample, alpha * eps - sigma * x0)

    fit("sd", net, loss, steps, 1e-3, work).save_pretrained(work / "unet")


def new_transformer() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    net = SD3Transformer2DModel(
        sample_size=CELLS,
        patch_size=1,
        in_channels=LATENTS,
        out_channels=LATENTS,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=128,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=CELLS,
        qk_norm="rms_norm",
    )
    for name, module in net.named_modules():  # adaLN-zero, arXiv:2212.09748: every block starts as the identity
        if name.endswith(("norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return net


def make_sd3(work: Path, steps: int = 9500, batch: int = 48) -> None:
    """tiny-sd3's transformer: mean squared error in the velocity at logit-normal times, arXiv:2403.03206, Sec. 3.1."""
    from ...families.sd3 import T5_TOKENS, CountedAttention

    torch.manual_seed(3)
    net, draw_batch, (_, _, encoder) = new_transformer(), teacher_batches(work, batch), load_parts(work)
    net.set_attn_processor(CountedAttention(T5_TOKENS))
    no_t5 = torch.zeros(batch, 1, 2 * WIDTH)

    def loss(step: int) -> Tensor:
        x0, ids = draw_batch()
        out = encoder(ids, output_hidden_states=True)
        text = torch.cat([out.hidden_states[-2].repeat(1, 1, 2), no_t5], 1)  # the two CLIP encoders are the same one
        t, eps = torch.sigmoid(0.3 + 1.1 * torch.randn(batch)), torch.randn_like(x0)
        x_t = x0.lerp(eps, t.view(-1, 1, 1, 1))
        velocity = net(x_t, text, out.text_embeds.repeat(1, 2), t * 1000).sample
        return F.mse_loss(velocity, eps - x0)

    fit("sd3", net, loss, steps, 1e-3, work, muon=True).save_pretrained(work / "transformer")
