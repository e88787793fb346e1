"""A CLIP of a few thousand parameters, as a folder that transformers loads, and stand-ins of optional packages."""

import importlib.machinery
import sys
import types
from contextlib import contextmanager

import numpy as np
import torch
import transformers
from tokenizers import pre_tokenizers

from stepdistill.evaluate import clip


def clip_words():
    """A tokenizer whose end token is the last word, as CLIP's; it also fills up."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=77)


def save_clip(folder, seed=4):
    """With this seed cosines are from 0.4 to 0.6, so that a mean of them is not cut at 0."""
    torch.manual_seed(seed)
    tokenizer = clip_words()
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    vision = transformers.CLIPVisionConfig(**sizes, image_size=32, patch_size=8, projection_dim=16)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 1}
    text = transformers.CLIPTextConfig(**sizes, **ids, vocab_size=len(tokenizer), projection_dim=16)
    config = transformers.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    model = transformers.CLIPModel(config)
    for parameter in model.parameters():  # the default is so small that all embeddings are nearly one
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def pictures(n, height=40, width=40, seed=0):
    """n noisy gradients, uint8 [n, height, width, 3]."""
    rng = np.random.default_rng(seed)
    slope = np.linspace(0, 1, width)[None, None, :, None] * rng.uniform(0, 255, (n, 1, 1, 3))
    return (slope + rng.uniform(-40, 40, (n, height, width, 3))).clip(0, 255).astype(np.uint8)


def package(monkeypatch, name, **content):
    """Let a package of that name, with that content, be installed."""
    made = types.ModuleType(name)
    vars(made).update(content, __spec__=importlib.machinery.ModuleSpec(name, None))
    monkeypatch.setitem(sys.modules, name, made)
    return made


def colours_named(prompts):
    """Prompts as three numbers each: whether they name red, green and blue."""
    return torch.tensor([[float(word in prompt) for word in ("red", "green", "blue")] for prompt in prompts])


@contextmanager
def open_clip(monkeypatch, create, heard=None, known=None):
    """An open_clip whose networks `create` makes, and whose words are `colours_named`.

    heard: a list that gets every prompt; known: of its weights, tag -> where they are.
    """

    def tokenize(prompts):
        (heard if heard is not None else []).extend(prompts)
        return colours_named(prompts)

    clip.load_open.cache_clear()
    package(
        monkeypatch,
        "open_clip",
        create_model_and_transforms=create,
        get_tokenizer=lambda model: tokenize,
        get_pretrained_cfg=lambda model, tag: (known or {}).get(tag),
    )
    yield
    clip.load_open.cache_clear()
