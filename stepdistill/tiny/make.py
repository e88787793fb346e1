"""Makes the embedded teachers from nothing.

    python -m stepdistill.tiny.make autoencoder decoder text latents sd sd3 pack --work build/tiny

Each stage reads what earlier stages left in the work folder, prints a line every few seconds, and resumes where it was
stopped. The judge is made by `stepdistill.tiny.train_judge`, the figures by `stepdistill.evaluate.teachers`.

Settings are the constants and defaults below. What ships took, on one core of a 2-core machine each (torch 2.13, AVX2):
autoencoder 2,000 steps, 20 min; decoder 1,200, 11 min; text 500, 4 min; latents 3 min; sd 4,100, 55 min. tiny-sd3 does not
ship yet: nobody has let `sd3` run to its end.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .judge import to_net
from .world import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, SIZES, Drawings, Scene, draw, scenes

LATENTS, CELLS = 12, 8  # channels, side
TEXT_WIDTH, TEXT_LENGTH = 128, 24
POOL = 40_000  # pictures that autoencoder and judge train on
CAPTIONED = 60_000  # pictures, encoded, that teachers train on
SEED_FIT, SEED_TEACH = 11, 12  # drawings' seeds; evaluation uses others (see evaluate/tiny.py)


def fit(
    name: str,
    nets: nn.Module,
    loss: Callable[[int], Tensor],
    steps: int,
    lr: float,
    work: Path,
    ema: float = 0.999,
    warm: int = 100,
    cool: float = 0.4,
) -> nn.Module:
    """Minimize loss(step) over nets with AdamW; returns the moving average of nets. Resumes from work/name.pt.

    The rate rises for `warm` steps, stays at lr, and falls linearly to zero over the last share `cool` of the steps.
    """
    path, shadow = work / f"{name}.pt", copy.deepcopy(nets).requires_grad_(False)
    optimizer = torch.optim.AdamW(nets.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)
    start, spent, shown = 0, 0.0, 0.0
    if path.exists():
        state = torch.load(path, weights_only=True)
        nets.load_state_dict(state["nets"]), shadow.load_state_dict(state["shadow"])
        optimizer.load_state_dict(state["optimizer"])
        start, spent = state["step"], state["seconds"]
    began, mean = time.time() - spent, None
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / warm, (steps - step) / (cool * steps))
        torch.manual_seed(1_000_003 * step)
        value = loss(step)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(nets.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        decay = min(ema, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(shadow.parameters()), list(nets.parameters()), 1 - decay)
            for kept, live in zip(shadow.buffers(), nets.buffers(), strict=True):
                kept.copy_(live)
        mean = value.item() if mean is None else 0.98 * mean + 0.02 * value.item()
        last = step + 1 == steps
        if last or time.time() - shown > 10:
            shown = time.time()
            left = (shown - began) / (step + 1) * (steps - step - 1)
            print(f"{name} {step + 1}/{steps}  loss {mean:.4f}  {shown - began:.0f} s, {left:.0f} s left", flush=True)
        if last or (step + 1) % 200 == 0:
            state = {"nets": nets.state_dict(), "shadow": shadow.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | {"step": step + 1, "seconds": time.time() - began}, work / f"{name}.tmp")
            (work / f"{name}.tmp").replace(path)
    return shadow.eval()


def pictures(work: Path) -> tuple[list[Scene], Drawings]:
    """The drawings that autoencoder and judge learn from, all combinations included."""
    path, told = work / "pictures.npz", scenes(POOL, SEED_FIT)
    if not path.exists():
        np.savez(path, **draw(told, SEED_FIT)._asdict())
    with np.load(path) as saved:
        return told, Drawings(**saved)


# --- autoencoder -----------------------------------------------------------------------------------------------------


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
    vae = load_parts(work)[0]
    decoder = nn.ModuleDict({"post_quant_conv": vae.post_quant_conv, "decoder": vae.decoder})
    decoder, (_, drawn) = copy.deepcopy(decoder).requires_grad_(True), pictures(work)

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



# --- text ------------------------------------------------------------------------------------------------------------


def new_tokenizer():
    """A CLIPTokenizer in which every word of the captions is one token; other text falls back to letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    sample = [*SHAPES, *COLOURS, *SIZES, *BACKGROUNDS, *RELATIONS, "a", "an", "the", "and", "on", "background"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}, merges=[]).backend_tokenizer
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    bpe.normalizer, bpe.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    bpe.train_from_iterator(
        sample,
        trainers.BpeTrainer(vocab_size=4000, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False),
    )
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = letters + [c + "</w>" for c in letters] + ["".join(pair) for pair in merges]
    vocab = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT_LENGTH)
    words = " ".join(sample).split()
    assert all(len(tokenizer(word).input_ids) == 3 for word in words), "some word is more than one token"
    return tokenizer


def new_text_encoder(tokenizer) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            hidden_act="gelu",
        )
    )


def token_ids(tokenizer, captions: list[str]) -> Tensor:
    """[N, TEXT_LENGTH], padded as the pipelines pad."""
    kwargs = {"padding": "max_length", "max_length": TEXT_LENGTH, "truncation": True, "return_tensors": "pt"}
    return tokenizer(captions, **kwargs).input_ids


def stated(scenes: list[Scene]) -> Tensor:
    """[N, 11] what captions state, as classes; -1 where a scene states nothing: three of (size, colour, shape), relation,
    background."""
    rows = []
    for scene in scenes:
        row = [x for t in scene.things for x in (SIZES.index(t.size), COLOURS.index(t.colour), SHAPES.index(t.shape))]
        relation = tuple(RELATIONS).index(scene.relation) if scene.relation else -1
        rows.append(row + [-1] * (9 - len(row)) + [relation, BACKGROUNDS.index(scene.background)])
    return torch.tensor(rows)


def make_text(work: Path, steps: int = 500, batch: int = 192) -> None:
    """Teach the text encoder to state what a caption states, linearly, from its pooled and from its penultimate output."""
    torch.manual_seed(1)
    tokenizer = new_tokenizer()
    encoder = new_text_encoder(tokenizer)
    classes = [len(SIZES), len(COLOURS), len(SHAPES)] * 3 + [len(RELATIONS), len(BACKGROUNDS)]
    heads = nn.ModuleList(nn.Linear(TEXT_WIDTH, sum(classes)) for _ in range(3))
    nets = nn.ModuleDict({"encoder": encoder, "heads": heads})
    told = scenes(60_000, SEED_TEACH, "seen")
    ids, truth = token_ids(tokenizer, [s.caption for s in told]), stated(told)

    def loss(step: int) -> Tensor:
        rows = torch.randint(len(ids), (batch,))
        out = encoder(ids[rows], output_hidden_states=True)
        last = (ids[rows] == tokenizer.eos_token_id).int().argmax(1)  # the first end token sees the whole caption
        at = torch.arange(batch)
        seen = [out.text_embeds, out.hidden_states[-2][at, last], out.last_hidden_state[at, last]]
        scores = [s for head, x in zip(heads, seen, strict=True) for s in head(x).split(classes, 1)]
        target = truth[rows].repeat(1, 3).T
        return sum(F.cross_entropy(s, y, ignore_index=-1) for s, y in zip(scores, target, strict=True)) / len(classes)

    nets = fit("text", nets, loss, steps, 2e-3, work)
    nets["encoder"].save_pretrained(work / "text_encoder")
    tokenizer.save_pretrained(work / "tokenizer")



# --- teachers --------------------------------------------------------------------------------------------------------


def load_parts(work: Path):
    """The frozen autoencoder, tokenizer and text encoder that both teachers share: those of the work folder, or, to train
    a teacher beside those that ship, of the package."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    home = work if (work / "vae").is_dir() else Path(__file__).parent / "tiny-sd"
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


def teacher_batches(work: Path, batch: int) -> tuple[Callable[[], tuple[Tensor, Tensor]], Tensor]:
    """A function that draws (latents, token ids) of a batch with one caption in ten empty."""
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
        cross_attention_dim=TEXT_WIDTH,
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


def make_sd(work: Path, steps: int = 4100, batch: int = 64) -> None:
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
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=128,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=CELLS,
        qk_norm="rms_norm",
    )
    for name, module in net.named_modules():  # adaLN-zero, arXiv:2212.09748: every block starts as the identity
        if name.endswith(("norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return net


def make_sd3(work: Path, steps: int = 4400, batch: int = 48) -> None:
    """tiny-sd3's transformer: mean squared error in the velocity at logit-normal times, arXiv:2403.03206, Sec. 3.1."""
    from ..families.sd3 import T5_TOKENS, CountedAttention

    torch.manual_seed(3)
    net, draw_batch, (_, _, encoder) = new_transformer(), teacher_batches(work, batch), load_parts(work)
    net.set_attn_processor(CountedAttention(T5_TOKENS))
    no_t5 = torch.zeros(batch, 1, 2 * TEXT_WIDTH)

    def loss(step: int) -> Tensor:
        x0, ids = draw_batch()
        out = encoder(ids, output_hidden_states=True)
        text = torch.cat([out.hidden_states[-2].repeat(1, 1, 2), no_t5], 1)  # the two CLIP encoders are the same one
        t, eps = torch.sigmoid(0.3 + 1.1 * torch.randn(batch)), torch.randn_like(x0)
        x_t = x0.lerp(eps, t.view(-1, 1, 1, 1))
        velocity = net(x_t, text, out.text_embeds.repeat(1, 2), t * 1000).sample
        return F.mse_loss(velocity, eps - x0)

    fit("sd3", net, loss, steps, 1e-3, work).save_pretrained(work / "transformer")


def new_silent_t5():
    """SD3's third text encoder, as small as can be: its last norm is zero, so that it says nothing. The pipeline can do
    without a T5, but `from_pretrained` cannot."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    tokenizer = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -1.0)], extra_ids=0)
    width = 2 * TEXT_WIDTH  # SD3 pads its CLIP tokens to T5's width
    encoder = T5EncoderModel(T5Config(vocab_size=4, d_model=width, d_kv=8, d_ff=8, num_layers=1, num_heads=1))
    nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return tokenizer, encoder


def pack(work: Path) -> None:
    """Write what is there of the two pipelines, in half precision, beside this file, with checksums for `doctor`."""
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
    folder = Path(__file__).parent / name
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


STAGES: dict[str, Callable[[Path], None]] = {
    "autoencoder": make_autoencoder,
    "decoder": make_decoder,
    "text": make_text,
    "latents": make_latents,
    "sd": make_sd,
    "sd3": make_sd3,
    "pack": pack,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=tuple(STAGES))
    parser.add_argument("--work", type=Path, default=Path("build/tiny"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    for stage in options.stages:
        STAGES[stage](options.work)


if __name__ == "__main__":
    main()
