"""The finished pipelines as folders that ship in the package."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import nn

from .teachers import load_parts, new_ddpm_scheduler
from .text import WIDTH

HOME = Path(__file__).parents[1]


def new_silent_t5():
    """SD3's third text encoder, as small as can be: its last norm is zero, so that it says nothing. The pipeline can do
    without a T5, but `from_pretrained` cannot."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    tokenizer = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -1.0)], extra_ids=0)
    width = 2 * WIDTH  # SD3 pads its CLIP tokens to T5's width
    encoder = T5EncoderModel(T5Config(vocab_size=4, d_model=width, d_kv=8, d_ff=8, num_layers=1, num_heads=1))
    nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return tokenizer, encoder


def pack(work: Path) -> None:
    """Write what is there of the two pipelines, in half precision, into the package, with checksums for `doctor`."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextModel

    vae, tokenizer, encoder = load_parts(work)
    vae.to(memory_format=torch.contiguous_format)
    if (work / "unet").is_dir():
        plain = CLIPTextModel(encoder.config)
        plain.load_state_dict(encoder.text_model.state_dict())
        unet = UNet2DConditionModel.from_pretrained(work / "unet")
        parts = (vae, plain, tokenizer, unet, new_ddpm_scheduler(), None, None)
        save(StableDiffusionPipeline(*parts, requires_safety_checker=False), "tiny-sd")
    if (work / "transformer").is_dir():
        transformer = SD3Transformer2DModel.from_pretrained(work / "transformer")
        t5_tokenizer, t5 = new_silent_t5()
        parts = (transformer, FlowMatchEulerDiscreteScheduler(shift=1.0), vae, encoder, tokenizer, encoder, tokenizer)
        save(StableDiffusion3Pipeline(*parts, t5, t5_tokenizer), "tiny-sd3")


def save(pipe, name: str) -> None:
    folder = HOME / name
    pipe.to(torch.float16).save_pretrained(folder)
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes for its owner alone
    for file in folder.glob("text_encoder*/config.json"):  # transformers would open these in float16, diffusers the rest
        file.write_text(file.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))  # in float32
    for file in folder.rglob("config.json"):  # where it was made is nobody's business
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(line for line in lines if '"_name_or_path"' not in line))
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name not in ("SHA256SUMS", "figures.json"))
    lines = [f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.relative_to(folder).as_posix()}\n" for f in files]
    (folder / "SHA256SUMS").write_text("".join(lines))
    print(f"{folder}: {sum(f.stat().st_size for f in files) / 2**20:.1f} MiB")
