"""Networks that turn pictures into rows of features, which the distances compare. FEATURES names them.

Weights come from their libraries' own caches. A row depends on its picture alone, apart from rounding in the last digits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UserError
from ..extras import importing
from ..tiny.judge import FEATURES as JUDGED
from ..tiny.judge import judge_key, load_judge
from ..tiny.world import PIXELS
from . import clip, resize
from .weights import exact, url_file

BATCH, THREADS = 64, 4  # pictures that a network reads at once; threads that prepare them


class Features(Protocol):
    """One network that turns pictures into rows."""

    name: str  # the network and its weights; goes into provenance
    dim: int
    filter: str  # how pictures are resized for it; goes into provenance
    least: int  # pixels that the shorter edge of a picture must have

    def __call__(self, pictures: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        """uint8 [N, H, W, 3], or N pictures [H, W, 3] of any sizes -> float32 [N, dim]."""
        ...


@dataclass(frozen=True)
class Network:
    """Features that first prepare each picture alone."""

    name: str
    dim: int
    filter: str
    prepare: Callable[[np.ndarray], np.ndarray]  # uint8 [H, W, 3] -> [S, S, 3]
    read: Callable[[Tensor], Tensor]  # float32 [N, 3, S, S] in [0, 255], on the device -> [N, dim]
    device: torch.device
    least: int = 1

    def __call__(self, pictures: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        rows = [np.empty((0, self.dim), np.float32)]
        with ThreadPoolExecutor(THREADS) as pool, exact():
            for i in range(0, len(pictures), BATCH):
                x = torch.from_numpy(np.stack(list(pool.map(self.prepare, pictures[i : i + BATCH]))))
                rows.append(self.read(x.permute(0, 3, 1, 2).to(self.device).float()).float().cpu().numpy())
        return np.concatenate(rows)


@dataclass(frozen=True)
class Fitted:
    """Features of pictures that were first cropped to their middle square and resized to one size (Lanczos, uint8).

    So DMD2 compares pictures of 512 pixels with photographs of any size, at 256 pixels (arXiv:2405.14867, appendix).
    """

    of: Features
    size: int

    @property
    def name(self) -> str:
        return self.of.name

    @property
    def dim(self) -> int:
        return self.of.dim

    @property
    def least(self) -> int:
        return 1

    @property
    def filter(self) -> str:
        return f"middle square, Lanczos to {self.size}; {self.of.filter}"

    def __call__(self, pictures: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        return self.of([resize.square(picture, self.size) for picture in pictures])


def inception(device: torch.device) -> Features:
    """The 2048 pooled features of FID's Inception network, with clean-fid's resizing (arXiv:1706.08500, arXiv:2104.11222).

    Raises:
        UserError: the package torch_fidelity or its weights are not there.
    """
    name, net = inception_net(device)
    return Network(name, 2048, "bicubic, antialiased, float (clean-fid)", resize.clean, net, device)


def inception_patch(device: torch.device) -> Features:
    """The same of each picture's middle 299 pixels, not resized: detail that the resizing hides (DMD2, arXiv:2405.14867).

    Raises:
        UserError: as `inception`; when called, a picture is smaller than 299 pixels.
    """
    name, net = inception_net(device)
    return Network(name, 2048, f"none, middle {resize.PATCH} pixels", patch, net, device, resize.PATCH)


def patch(picture: np.ndarray) -> np.ndarray:
    """The middle [299, 299, 3] of a picture."""
    height, width = picture.shape[:2]
    if min(height, width) < resize.PATCH:
        raise UserError(
            f"a picture of {width}x{height} pixels has no patch of {resize.PATCH}x{resize.PATCH}, which patch FID compares; "
            f"make pictures of {resize.PATCH} pixels or more, or leave out the features inception-patch"
        )
    return resize.centre(picture, resize.PATCH, resize.PATCH)


@functools.cache
def inception_net(device: torch.device) -> tuple[str, Callable[[Tensor], Tensor]]:
    """Name, and [N, 3, 299, 299] in [0, 255] -> [N, 2048].

    torch-fidelity's own forward takes whole numbers and resizes as TensorFlow 1 did; its layers are run one after the other
    instead, which gives the same for whole numbers that need no resizing (random weights: within 3e-8 of 0.2).
    """
    what = "FID (features inception)"
    with importing("torch_fidelity", what):
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
    weights = url_file(what, URL_INCEPTION_V3)
    whole = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(weights))
    layers = [layer for name, layer in whole.named_children() if name != "fc"]  # in the order in which they are run
    net = nn.Sequential(*layers, nn.Flatten()).to(device).eval().requires_grad_(False)
    return "FID Inception, 2015-12-05 (torch-fidelity)", lambda x: net((x - 128) / 128)


def clip_features(device: torch.device, source: str = clip.CMMD) -> Features:
    """CLIP's image embeddings of unit norm, prepared as for CMMD (Jayasumana et al., arXiv:2401.09603).

    source: a hub id, or a folder of CLIPModel and its tokenizer.

    Raises:
        UserError: the weights are not there.
    """
    name, model, _ = clip.load(source, device)
    size = model.config.vision_config.image_size

    def read(x: Tensor) -> Tensor:
        return clip.embed_pictures(model, x)

    way = f"middle square, bicubic to {size}, antialiased, uint8 (CMMD)"
    return Network(name, model.config.projection_dim, way, functools.partial(clip.cmmd_view, size=size), read, device)


def judge(device: torch.device) -> Features:
    """The 64 features of the embedded world's judge.

    Raises:
        UserError: when called, a picture is not one of that world.
    """
    net = load_judge().to(device)
    name = f"embedded judge {judge_key()[:8]}"
    return Network(name, JUDGED, "none", drawing, lambda x: net.features(x / 127.5 - 1), device)


def drawing(picture: np.ndarray) -> np.ndarray:
    """A picture that the judge can read."""
    if picture.shape != (PIXELS, PIXELS, 3):
        raise UserError(
            f"a picture of {picture.shape[1]}x{picture.shape[0]} pixels is not of the embedded world, whose judge reads "
            f"{PIXELS}x{PIXELS}; use the features inception or clip for others"
        )
    return picture


FEATURES: dict[str, Callable[[torch.device], Features]] = {
    "inception": inception,
    "inception-patch": inception_patch,
    "clip": clip_features,
    "judge": judge,
}
