"""Parts of the tiny pipelines: tokenizers, text encoders, autoencoders; all made from nothing."""

from __future__ import annotations

import itertools
import string

import diffusers
import torch
import transformers
from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video as hunyuan
from tokenizers import pre_tokenizers
from torch import nn


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


def gemma_tokenizer():
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", *string.ascii_letters, *string.digits, *string.punctuation]
    return transformers.GemmaTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[])


def gemma(layers):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": layers, "head_dim": 16}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    return transformers.Gemma2Model(transformers.Gemma2Config(**sizes, **heads, vocab_size=128))


def qwen_tokenizer(content="m['content']"):
    """content: of a message, as the pipeline passes it."""
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = transformers.Qwen2Tokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[])
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{" + content + "}}<|im_end|>{% endfor %}"
    return tokenizer


def qwen(layers, make=transformers.Qwen3Model):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": layers, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return make(transformers.Qwen3Config(**sizes, **heads, vocab_size=300, max_position_embeddings=1024))


def autoencoder(channels=(4, 8), make=diffusers.AutoencoderKL, **kw):
    return make(
        block_out_channels=channels,
        down_block_types=["DownEncoderBlock2D"] * len(channels),
        up_block_types=["UpDecoderBlock2D"] * len(channels),
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


def flow(**config):
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


def template_tokenizer():
    """Of Llama's kind, that makes of HunyuanVideo's template about the 95 tokens that its pipeline cuts off."""
    prefix = hunyuan.DEFAULT_PROMPT_TEMPLATE["template"].partition("{}")[0]
    cuts = [len(prefix) * k // 94 for k in range(95)]
    words = ["<unk>", "<s>", "</s>", "\u2581", *string.ascii_letters, *string.digits, *string.punctuation]
    tokenizer = transformers.LlamaTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[])
    tokenizer.pad_token = "</s>"
    tokenizer.add_tokens([prefix[i:j] for i, j in itertools.pairwise(cuts)])
    return tokenizer


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
