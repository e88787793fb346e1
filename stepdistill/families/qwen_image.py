"""Qwen-Image: QwenImagePipeline, a rectified-flow transformer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import Family
from .packed import Packed, off_grid, on_grid
from .text import padded, trimmed


class QwenImage(Packed, Family):
    """Guidance is plain here; the pipeline, when it is given a negative prompt, also scales each guided token to the length of
    the unguided one. Its autoencoder is one of videos: a picture is a video of one frame."""

    pipeline = "QwenImagePipeline"
    lora_targets = (
        *Packed.lora_targets,
        *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2", "img_mod.1", "txt_mod.1"),
    )

    @property
    def sampler_call(self) -> dict[str, Any]:
        return {"true_cfg_scale": 1.0}  # guidance_scale would be an input that its network lacks

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        length = self.default("max_sequence_length")
        encoded = (self.pipe.encode_prompt([prompt], max_sequence_length=length)[0][0] for prompt in prompts)
        return padded(encoded, length)

    def null_prompts(self) -> dict[str, Tensor]:
        return self.encode_prompts([" "])  # the negative prompt of its model card

    def forward(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        text, mask = trimmed(cond["text"], cond["mask"])
        out = net(
            hidden_states=self.packed(x_t).to(net.dtype),
            timestep=self.rounded(t, net.dtype),
            encoder_hidden_states=text.to(net.dtype),
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, *x_t.shape[1:3])]] * len(x_t),
        ).sample
        return out.reshape(x_t.shape)

    def encode(self, images: Tensor) -> Tensor:
        return on_grid(Family.encode(self, images[:, :, None])[:, :, 0])

    def decode(self, latents: Tensor) -> Tensor:
        return Family.decode(self, off_grid(latents)[:, :, None])[:, :, 0]

    def moments(self) -> tuple[Tensor, Tensor]:
        vae = self.pipe.vae
        both = torch.tensor([vae.config.latents_mean, vae.config.latents_std], device=vae.device, dtype=vae.dtype)
        return both[0, :, None, None, None], both[1, :, None, None, None]

    @property
    def factor(self) -> int:
        return self.pipe.vae_scale_factor
