"""What people are said to prefer: HPSv2.1 (arXiv:2306.09341) and ImageReward (arXiv:2304.05977), one score a picture.

Both were trained on older generators' pictures and can be pleased by saturated colours; read them beside `colour`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..errors import UserError
from ..extras import importing
from .clip import Score, cosines, load_open, standardized
from .resize import centre
from .weights import exact, hub_state

IMAGE_REWARD = "~/.cache/ImageReward"  # where that package looks for its files
VIEW = 224  # pixels a side that HPSv2 sees


class HpsScore:
    """HPSv2.1: the cosine of open_clip's ViT-H/14 with the tuned weights of the hub's xswu/HPSv2; some 0.2 to 0.3.

    The package hpsv2 wraps the same network; it is not used, because its wheel lacks the tokenizer's words.
    """

    name, prefix, filter = "HPSv2.1 (open_clip ViT-H-14)", "", f"shorter edge bicubic to {VIEW}, antialiased, float; the middle"

    def __init__(self, device: torch.device, model: str = "ViT-H-14"):
        net, _, self.tokenize = load_open(device, model, None)
        net.load_state_dict(hub_state("HPSv2.1", "xswu/HPSv2", "HPS_v2.1_compressed.pt")["state_dict"])
        self.model, self.device = net, device

    def __call__(self, pictures: Sequence[np.ndarray] | np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        return cosines(pictures, prompts, self.see, self.hear)

    def see(self, pictures: Sequence[np.ndarray]) -> Tensor:
        shown = torch.stack([hps_view(picture) for picture in pictures]).to(self.device)
        return F.normalize(self.model.encode_image(standardized(shown)), dim=-1)

    def hear(self, prompts: Sequence[str]) -> Tensor:
        return F.normalize(self.model.encode_text(self.tokenize(list(prompts)).to(self.device)), dim=-1)


def hps_view(picture: np.ndarray, size: int = VIEW) -> Tensor:
    """[3, size, size] in about [0, 255], of uint8 [H, W, 3]: bicubic in float, where open_clip's own rounds to uint8."""
    height, width = picture.shape[:2]
    short = min(height, width)
    x = torch.tensor(picture).permute(2, 0, 1)[None].float()
    x = F.interpolate(x, (int(size * height / short), int(size * width / short)), mode="bicubic", antialias=True)[0]
    return torch.from_numpy(centre(x.permute(1, 2, 0).numpy(), size, size)).permute(2, 0, 1)


class ImageRewardScore:
    """ImageReward-v1.0: about -2 to 2, of unit spread over the pictures that it was trained on.

    Its package 1.5 does not import beside transformers 5; the error says so.
    """

    name, prefix, filter = "ImageReward-v1.0", "", "its own"

    def __init__(self, device: torch.device):
        with importing("ImageReward", "the score image-reward"):
            import ImageReward
        try:
            self.model = ImageReward.load("ImageReward-v1.0", device=device)
        except (OSError, RuntimeError, ValueError) as error:
            place = Path(IMAGE_REWARD).expanduser()
            raise UserError(
                f"the score image-reward needs ImageReward.pt and med_config.json in {place}, and the tokenizer "
                f"bert-base-uncased in the hub's cache; where there is internet run: hf download THUDM/ImageReward "
                f"ImageReward.pt med_config.json --local-dir {place}; hf download bert-base-uncased; and copy them here"
            ) from error

    @exact()
    def __call__(self, pictures: Sequence[np.ndarray] | np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        if len(pictures) != len(prompts):
            raise ValueError(f"{len(pictures)} pictures and {len(prompts)} prompts: each picture needs its own prompt")
        found = []
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/picture.png"  # all its versions read files
            for picture, prompt in zip(pictures, prompts, strict=True):
                Image.fromarray(picture).save(path)
                found.append(self.model.score(prompt, path))
        return np.array(found, np.float32)


REWARDS: dict[str, Callable[[torch.device], Score]] = {"hps": HpsScore, "image-reward": ImageRewardScore}
