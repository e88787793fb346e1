"""CLIP: how well a picture fits its prompt, and the embeddings behind it (Radford et al. 2021, arXiv:2103.00020).

Two conventions are in use, and their figures do not compare:
- torchmetrics and most papers: OpenAI's ViT-L/14, 100 times the mean cosine, at least 0 (`ClipScore`, `percent`);
- DMD2 (arXiv:2405.14867): LAION's ViT-g/14 in open_clip, the prompt after "A photo depicts ", the mean cosine as it is
  (`OpenClipScore`).
Both scores here return plain cosines, one a picture.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.Image import Resampling
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel, PreTrainedTokenizerBase

from ..errors import UserError
from ..extras import importing
from . import resize
from .weights import exact, from_hub

SCORE, CMMD = "openai/clip-vit-large-patch14", "openai/clip-vit-large-patch14-336"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's pictures in [0, 1]
BATCH = 32


class Score(Protocol):
    """Pictures and their prompts -> one number a picture."""

    name: str  # the network and its weights; goes into provenance
    prefix: str  # said before each prompt
    filter: str  # how pictures are resized for it; goes into provenance

    def __call__(self, pictures: Sequence[np.ndarray] | np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """uint8 [N, H, W, 3] and N prompts -> float32 [N]."""
        ...


class ClipScore:
    """Cosine of a picture's and its prompt's embedding; source: a hub id, or a folder of CLIPModel and its tokenizer.

    Longer prompts are cut to what CLIP reads (77 tokens), the end token kept. torchmetrics cuts that off too, and then reads
    all long prompts alike; for shorter ones `percent` of these cosines is its CLIPScore. (With transformers 5 torchmetrics
    1.9 cannot run a CLIP at all.)
    """

    prefix = ""

    def __init__(self, device: torch.device, source: str = SCORE):
        self.name, self.model, self.tokenizer = load(source, device)
        self.size = self.model.config.vision_config.image_size
        self.filter = f"shorter edge bicubic to {self.size}, middle square, uint8 (CLIP)"

    def __call__(self, pictures: Sequence[np.ndarray] | np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        return cosines(pictures, prompts, self.see, self.hear)

    def see(self, pictures: Sequence[np.ndarray]) -> Tensor:
        shown = np.stack([resize.clip_view(picture, self.size) for picture in pictures])
        return embed_pictures(self.model, torch.from_numpy(shown).permute(0, 3, 1, 2).to(self.model.device).float())

    def hear(self, prompts: Sequence[str]) -> Tensor:
        most = self.model.config.text_config.max_position_embeddings
        words = self.tokenizer(list(prompts), padding=True, truncation=True, max_length=most, return_tensors="pt")
        words = {name: words[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        return F.normalize(embedded(self.model.get_text_features(**words)), dim=-1)


class OpenClipScore:
    """The same with a network of open_clip, as the evaluation of DMD2 computes it: middle square, Lanczos to 256, then CLIP's
    own resizing; float32."""

    def __init__(
        self,
        device: torch.device,
        model: str = "ViT-g-14",
        pretrained: str | None = "laion2b_s12b_b42k",
        prefix: str = "A photo depicts ",
        size: int = 256,
    ):
        self.model, self.preprocess, self.tokenize = load_open(device, model, pretrained)
        self.name, self.prefix, self.size, self.device = f"{model} {pretrained} (open_clip)", prefix, size, device
        self.filter = f"middle square, Lanczos to {size}; CLIP's"

    def __call__(self, pictures: Sequence[np.ndarray] | np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        return cosines(pictures, prompts, self.see, self.hear)

    def see(self, pictures: Sequence[np.ndarray]) -> Tensor:
        shown = [self.preprocess(Image.fromarray(resize.square(picture, self.size))) for picture in pictures]
        return F.normalize(self.model.encode_image(torch.stack(shown).to(self.device)), dim=-1)

    def hear(self, prompts: Sequence[str]) -> Tensor:
        words = self.tokenize([self.prefix + prompt for prompt in prompts])
        return F.normalize(self.model.encode_text(words.to(self.device)), dim=-1)


@exact()
def cosines(
    pictures: Sequence[np.ndarray] | np.ndarray,
    prompts: Sequence[str],
    see: Callable[[Sequence[np.ndarray]], Tensor],
    hear: Callable[[Sequence[str]], Tensor],
) -> np.ndarray:
    """float32 [N] from embeddings of unit norm; see and hear get at most BATCH at once."""
    if len(pictures) != len(prompts):
        raise ValueError(f"{len(pictures)} pictures and {len(prompts)} prompts: each picture needs its own prompt")
    found = [np.empty(0, np.float32)]
    for i in range(0, len(prompts), BATCH):
        both = see(pictures[i : i + BATCH]) * hear(prompts[i : i + BATCH])
        found.append(both.sum(-1).float().cpu().numpy())
    return np.concatenate(found)


def percent(cosines: np.ndarray) -> float:
    """100 times the mean of cosines [N], at least 0, as torchmetrics' CLIPScore (Hessel et al. 2021, arXiv:2104.08718)."""
    return max(0.0, 100 * float(np.mean(cosines, dtype=np.float64)))


def embed_pictures(model: CLIPModel, x: Tensor) -> Tensor:
    """[N, 3, size, size] in [0, 255] -> [N, D] of unit norm."""
    return F.normalize(embedded(model.get_image_features(pixel_values=standardized(x))), dim=-1)


def standardized(x: Tensor) -> Tensor:
    """[N, 3, H, W] in [0, 255], less the mean of CLIP's pictures and by their spread."""
    mean, std = x.new_tensor(MEAN)[:, None, None], x.new_tensor(STD)[:, None, None]
    return (x / 255 - mean) / std


def embedded(said: Any) -> Tensor:
    """The projected embedding [N, D]; transformers 5 wraps it."""
    return said if isinstance(said, Tensor) else said.pooler_output


def cmmd_view(picture: np.ndarray, size: int) -> np.ndarray:
    """uint8 [size, size, 3] as the authors of CMMD read a file: middle square, bicubic, antialiased."""
    return resize.square(picture, size, Resampling.BICUBIC, math.floor)


@functools.cache
def load(source: str, device: torch.device) -> tuple[str, CLIPModel, PreTrainedTokenizerBase]:
    """Name, network in float32 and tokenizer of a CLIP on the hub or in a folder.

    Raises:
        UserError: it is not there and cannot be downloaded, or is no CLIP.
    """
    own = {"trust_remote_code": False, "local_files_only": Path(source).is_dir()}  # pickled weights are read as plain tensors
    with from_hub("CLIP", source):
        model = CLIPModel.from_pretrained(source, dtype=torch.float32, **own)
        tokenizer = AutoTokenizer.from_pretrained(source, **own)
    return f"{source} (transformers)", model.to(device).eval().requires_grad_(False), tokenizer


@functools.cache
def load_open(device: torch.device, model: str, pretrained: str | None) -> tuple[Any, Callable, Callable]:
    """Network in float32, its preprocessing and its tokenizer, of open_clip.

    Raises:
        UserError: the package open_clip or the weights are not there.
    """
    what = f"CLIP score by {model}"
    with importing("open_clip", what):
        import open_clip
    if pretrained is None:
        weights = model
    elif not (weights := (open_clip.get_pretrained_cfg(model, pretrained) or {}).get("hf_hub", "").strip("/")):
        raise UserError(f"open_clip knows no weights {pretrained} of {model}; see open_clip.list_pretrained()")
    with from_hub(what, weights):
        net, _, preprocess = open_clip.create_model_and_transforms(model, pretrained, precision="fp32", device=device)
    return net.eval().requires_grad_(False), preprocess, open_clip.get_tokenizer(model)


CLIPS: dict[str, Callable[[torch.device], Score]] = {"clip": ClipScore, "dmd2": OpenClipScore}
