"""Whole diffusers pipelines of a few thousand parameters, made from nothing; families and roles of them are real."""

from __future__ import annotations

import string

import diffusers
import torch
import transformers
from tokenizers import pre_tokenizers
from torch import nn
from worlds import SD_SCHEDULER

diffusers.utils.logging.set_verbosity_error()
transformers.logging.set_verbosity_error()

PROMPTS = ["a red cat", "a dog", "seven blue circles on sand"]


def clip_tokenizer():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<|startoftext|>", "<|pad|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    return transformers.CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=77)


def clip_config(width=16):
    sizes = {"hidden_size": width, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    return transformers.CLIPTextConfig(**sizes, **ids, vocab_size=600, projection_dim=width)


def t5_tokenizer():
    words = ["<pad>", "</s>", "<unk>", "\u2581", *string.ascii_letters, *string.digits, *string.punctuation]
    vocab = [(w, 0.0 if i < 3 else -float(i)) for i, w in enumerate(words)]
    return transformers.T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=256)


def t5():
    return transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=200, d_model=32, d_ff=16, d_kv=8, num_heads=2, num_layers=1)
    )


def autoencoder(**kw):
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=16,
        **kw,
    )


def unet(**kw):
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=2,
        **kw,
    )


def inert(vae, monkeypatch):
    """Let an autoencoder do nothing, so that latents are pixels."""
    posterior = type("Posterior", (), {})

    def encode(x):
        posterior.mean = x
        return type("Out", (), {"latent_dist": posterior})

    monkeypatch.setattr(vae, "encode", encode)
    monkeypatch.setattr(vae, "decode", lambda z, return_dict: (z,))


def sd(prediction_type="epsilon", time_cond_proj_dim=None):
    torch.manual_seed(0)
    scheduler = diffusers.DDIMScheduler(
        **SD_SCHEDULER, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type=prediction_type
    )
    return finish(
        diffusers.StableDiffusionPipeline(
            unet=unet(cross_attention_dim=16, attention_head_dim=2, time_cond_proj_dim=time_cond_proj_dim),
            scheduler=scheduler,
            vae=autoencoder(),
            text_encoder=transformers.CLIPTextModel(clip_config()),
            tokenizer=clip_tokenizer(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def sdxl(force_zeros=True):
    torch.manual_seed(0)
    net = unet(
        cross_attention_dim=32,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )
    scheduler = diffusers.EulerDiscreteScheduler(**SD_SCHEDULER, steps_offset=1, timestep_spacing="leading")
    return finish(
        diffusers.StableDiffusionXLPipeline(
            unet=net,
            scheduler=scheduler,
            vae=autoencoder(scaling_factor=0.13025),
            text_encoder=transformers.CLIPTextModel(clip_config()),
            tokenizer=clip_tokenizer(),
            text_encoder_2=transformers.CLIPTextModelWithProjection(clip_config()),
            tokenizer_2=clip_tokenizer(),
            force_zeros_for_empty_prompt=force_zeros,
        )
    )


def sd3(with_t5=False, dual=(), shift=3.0):
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        qk_norm="rms_norm",
        dual_attention_layers=dual,
    )
    return finish(
        diffusers.StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=shift),
            vae=autoencoder(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.53),
            text_encoder=transformers.CLIPTextModelWithProjection(clip_config()),
            tokenizer=clip_tokenizer(),
            text_encoder_2=transformers.CLIPTextModelWithProjection(clip_config()),
            tokenizer_2=clip_tokenizer(),
            text_encoder_3=t5() if with_t5 else None,
            tokenizer_3=t5_tokenizer() if with_t5 else None,
        )
    )


def flux(guidance_embeds=True, **scheduler):
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance_embeds,
    )
    return finish(
        diffusers.FluxPipeline(
            transformer=transformer,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**({"use_dynamic_shifting": True, "shift": 3.0} | scheduler)),
            vae=autoencoder(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.12, scaling_factor=0.36),
            text_encoder=transformers.CLIPTextModel(clip_config()),
            tokenizer=clip_tokenizer(),
            text_encoder_2=t5(),
            tokenizer_2=t5_tokenizer(),
        )
    )


def wan(boundary_ratio=None, expand_timesteps=False, flow_shift=3.0):
    """Wan 2.1; with a boundary_ratio the two experts of Wan 2.2; with expand_timesteps its smaller, single network."""
    torch.manual_seed(0)

    def transformer():
        return diffusers.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            text_dim=32,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
        )

    return finish(
        diffusers.WanPipeline(
            transformer=transformer(),
            transformer_2=None if boundary_ratio is None else transformer(),
            scheduler=diffusers.UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift
            ),
            vae=diffusers.AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
            text_encoder=t5(),
            tokenizer=t5_tokenizer(),
            boundary_ratio=boundary_ratio,
            expand_timesteps=expand_timesteps,
        )
    )


def finish(pipe):
    """Nothing trains, and no weight is zero: modulations and output layers that start at zero would hide mistakes."""
    for module in (m for m in pipe.components.values() if isinstance(m, nn.Module)):
        module.eval().requires_grad_(False)
    with torch.no_grad():
        for net in (getattr(pipe, name, None) for name in ("unet", "transformer", "transformer_2")):
            for p in net.parameters() if net is not None else ():
                if not p.any() or not p.isfinite().all():
                    p.normal_(0, 0.1)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def watch(pipe, prompts, **kw):
    """Runs the pipeline; returns its latents (or pictures, or videos) and each step's (network output, timestep, sample)."""
    seen, step = [], pipe.scheduler.step
    pipe.scheduler.step = lambda *args, **kw: seen.append(args[:3]) or step(*args, **kw)
    try:
        kw = {"num_inference_steps": 3, "output_type": "latent", "generator": torch.Generator().manual_seed(0), **kw}
        made = pipe(prompts, **kw)[0]
    finally:
        pipe.scheduler.step = step
    return made, seen
