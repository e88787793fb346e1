"""Pipelines of videos, as those in `pipelines`, where tests find them."""

from __future__ import annotations

import diffusers
import torch
import transformers
from parts import clip_config, clip_tokenizer, finish, t5, t5_tokenizer, template_tokenizer


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


def ltx():
    torch.manual_seed(0)
    scaling = (True, True, False, False)
    return finish(
        diffusers.LTXPipeline(
            transformer=diffusers.LTXVideoTransformer3DModel(
                in_channels=8,
                out_channels=8,
                num_attention_heads=4,
                attention_head_dim=8,
                cross_attention_dim=32,
                num_layers=2,
                caption_channels=32,
            ),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1),
            vae=diffusers.AutoencoderKLLTXVideo(
                latent_channels=8,
                decoder_block_out_channels=(8,) * 4,
                decoder_layers_per_block=(1,) * 5,
                block_out_channels=(8,) * 4,
                layers_per_block=(1,) * 5,
                spatio_temporal_scaling=scaling,
                decoder_spatio_temporal_scaling=scaling,
                decoder_inject_noise=(False,) * 5,
                upsample_residual=(False,) * 4,
                upsample_factor=(1,) * 4,
                patch_size=1,
            ),
            text_encoder=t5(),
            tokenizer=t5_tokenizer(),
        )
    )


def cogvideox(rope=False, patch_size_t=None):
    """CogVideoX 2B; with rope 5B; with rope and patch_size_t=2 version 1.5."""
    torch.manual_seed(0)
    return finish(
        diffusers.CogVideoXPipeline(
            transformer=diffusers.CogVideoXTransformer3DModel(
                num_attention_heads=2,
                attention_head_dim=16,
                in_channels=4,
                out_channels=4,
                time_embed_dim=8,
                text_embed_dim=32,
                num_layers=2,
                sample_width=8,
                sample_height=8,
                sample_frames=9,
                max_text_seq_length=226,
                use_rotary_positional_embeddings=rope,
                patch_size_t=patch_size_t,
            ),
            scheduler=diffusers.CogVideoXDDIMScheduler(
                prediction_type="v_prediction",
                rescale_betas_zero_snr=True,
                snr_shift_scale=3.0,
                clip_sample=False,
                timestep_spacing="trailing",
            ),
            vae=diffusers.AutoencoderKLCogVideoX(
                block_out_channels=(8,) * 4, latent_channels=4, layers_per_block=1, norm_num_groups=2
            ),
            text_encoder=t5(),
            tokenizer=t5_tokenizer(),
        )
    )


def hunyuanvideo():
    torch.manual_seed(0)
    llama = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 3, "vocab_size": 300}
    return finish(
        diffusers.HunyuanVideoPipeline(
            transformer=diffusers.HunyuanVideoTransformer3DModel(
                in_channels=4,
                out_channels=4,
                num_attention_heads=2,
                attention_head_dim=8,
                num_layers=1,
                num_single_layers=1,
                num_refiner_layers=1,
                text_embed_dim=16,
                pooled_projection_dim=16,
                rope_axes_dim=(2, 2, 4),
            ),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
            vae=diffusers.AutoencoderKLHunyuanVideo(
                latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4
            ),
            text_encoder=transformers.LlamaModel(transformers.LlamaConfig(**llama)),
            tokenizer=template_tokenizer(),
            text_encoder_2=transformers.CLIPTextModel(clip_config()),
            tokenizer_2=clip_tokenizer(),
        )
    )
