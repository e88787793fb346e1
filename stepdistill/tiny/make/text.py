"""The tokenizer and the text encoder that both teachers share."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..world import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, SIZES, Scene, scenes
from .fit import SEED_TEACH, fit

WIDTH, LENGTH = 128, 24  # of a token, and tokens


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
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH)
    words = " ".join(sample).split()
    assert all(len(tokenizer(word).input_ids) == 3 for word in words), "some word is more than one token"
    return tokenizer


def new_text_encoder(tokenizer) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            projection_dim=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            hidden_act="gelu",
        )
    )


def token_ids(tokenizer, captions: list[str]) -> Tensor:
    """[N, LENGTH], padded as the pipelines pad."""
    kwargs = {"padding": "max_length", "max_length": LENGTH, "truncation": True, "return_tensors": "pt"}
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
    heads = nn.ModuleList(nn.Linear(WIDTH, sum(classes)) for _ in range(3))
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
