"""Whole diffusers pipelines of a few thousand parameters, made from nothing; families and roles of them are real."""

from __future__ import annotations

import diffusers
import torch
import transformers
from parts import (
    autoencoder,
    clip_config,
    clip_tokenizer,
    finish,
    flow,
    gemma,
    gemma_tokenizer,
    qwen,
    qwen_tokenizer,
    t5,
    t5_tokenizer,
    unet,
)
from video_pipelines import cogvideox, hunyuanvideo, ltx, wan  # noqa: F401 - here is the one place where all are found
from worlds import SD_SCHEDULER

diffusers.utils.logging.set_verbosity_error()
transformers.logging.set_verbosity_error()

PROMPTS = ["a red cat", "a dog", "seven blue circles on sand"]


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
            scheduler=flow(shift=shift),
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
            scheduler=flow(**({"use_dynamic_shifting": True, "shift": 3.0} | scheduler)),
            vae=autoencoder(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.12, scaling_factor=0.36),
            text_encoder=transformers.CLIPTextModel(clip_config()),
            tokenizer=clip_tokenizer(),
            text_encoder_2=t5(),
            tokenizer_2=t5_tokenizer(),
        )
    )


def flux2(klein=False, distilled=False):
    """dev's text encoder is a Mistral; what matters here is which of a network's layers is read."""
    torch.manual_seed(0)
    transformer = diffusers.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=not klein,
    )
    vae = autoencoder(make=diffusers.AutoencoderKLFlux2, use_quant_conv=False, use_post_quant_conv=False)
    vae.bn.running_mean.normal_(0, 0.3)
    vae.bn.running_var.uniform_(0.5, 2)
    parts = {"vae": vae, "transformer": transformer, "scheduler": flow(use_dynamic_shifting=True, shift=3.0)}
    if klein:
        parts |= {"tokenizer": qwen_tokenizer(), "text_encoder": qwen(28, transformers.Qwen3ForCausalLM)}
        return finish(diffusers.Flux2KleinPipeline(**parts, is_distilled=distilled))
    parts |= {"tokenizer": qwen_tokenizer("m['content'][0]['text']"), "text_encoder": qwen(31)}
    return finish(diffusers.Flux2Pipeline(**parts))


def pixart():
    torch.manual_seed(0)
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        patch_size=2,
        num_layers=2,
        in_channels=4,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=32,
        use_additional_conditions=False,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(beta_schedule="linear")
    return finish(
        diffusers.PixArtSigmaPipeline(
            transformer=transformer,
            scheduler=scheduler,
            vae=autoencoder(),
            text_encoder=t5(),
            tokenizer=t5_tokenizer(),
        )
    )


def sana(sprint=False):
    torch.manual_seed(0)
    transformer = diffusers.SanaTransformer2DModel(
        sample_size=16,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        guidance_embeds=sprint,
        qk_norm="rms_norm_across_heads" if sprint else None,
    )
    encoder = {"encoder_block_out_channels": (8, 8), "encoder_qkv_multiscales": ((), (5,)), "encoder_layers_per_block": (1, 1)}
    decoder = {"decoder_block_out_channels": (8, 8), "decoder_qkv_multiscales": ((), (5,)), "decoder_layers_per_block": (1, 1)}
    vae = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        downsample_block_type="conv",
        scaling_factor=0.41407,
        **encoder,
        **decoder,
    )
    parts = {"transformer": transformer, "vae": vae, "text_encoder": gemma(1), "tokenizer": gemma_tokenizer()}
    if sprint:
        return finish(diffusers.SanaSprintPipeline(**parts, scheduler=diffusers.SCMScheduler()))
    config = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return finish(diffusers.SanaPipeline(**parts, scheduler=diffusers.DPMSolverMultistepScheduler(**config)))


def qwen_image():
    torch.manual_seed(0)
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 2.0, 0.5, 1.0],
    )
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 300}
    text |= {"num_key_value_heads": 2, "rope_parameters": rope}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    encoder = transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    )
    return finish(
        diffusers.QwenImagePipeline(
            transformer=transformer,
            scheduler=flow(use_dynamic_shifting=True),
            vae=vae,
            text_encoder=encoder,
            tokenizer=qwen_tokenizer(),
        )
    )


def z_image():
    torch.manual_seed(0)
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[600, 32, 32],
    )
    return finish(
        diffusers.ZImagePipeline(
            transformer=transformer,
            scheduler=flow(shift=3.0),
            vae=autoencoder(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.12, scaling_factor=0.36),
            text_encoder=qwen(2),
            tokenizer=qwen_tokenizer(),
        )
    )


def lumina2():
    torch.manual_seed(0)
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=4,
        in_channels=4,
        hidden_size=16,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        cap_feat_dim=16,
    )
    vae = autoencoder((4, 4, 4, 8), use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5)
    return finish(
        diffusers.Lumina2Pipeline(
            transformer=transformer,
            scheduler=flow(shift=6.0),
            vae=vae,
            text_encoder=gemma(2),
            tokenizer=gemma_tokenizer(),
        )
    )


def aura_flow():
    torch.manual_seed(0)
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=2,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pos_embed_max_size=256,
    )
    for name, p in transformer.named_parameters():
        if "attn" in name or "context_embedder" in name:
            torch.nn.init.normal_(p)  # or prompts hardly count
    return finish(
        diffusers.AuraFlowPipeline(
            transformer=transformer,
            scheduler=flow(shift=1.73),
            vae=autoencoder(scaling_factor=0.13025),
            text_encoder=t5(),
            tokenizer=t5_tokenizer(),
        )
    )


def watch(pipe, prompts, **kw):
    """Runs the pipeline; returns its latents (or pictures, or videos) and each step's (network output, timestep, sample)."""
    seen, step = [], pipe.scheduler.step
    pipe.scheduler.step = lambda *args, **kw: seen.append(args[:3]) or step(*args, **kw)
    try:
        kw = {"num_inference_steps": 3, "output_type": "latent", "generator": torch.Generator().manual_seed(0), **kw}
        made = pipe(prompt=prompts, **kw)[0]
    finally:
        pipe.scheduler.step = step
    return made, seen
