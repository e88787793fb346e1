"""Pipeline families by the name of their diffusers pipeline."""

from .base import Family
from .cogvideox import CogVideoX
from .flux import Flux
from .flux2 import Flux2, Flux2Klein
from .hunyuanvideo import HunyuanVideo
from .ltx import LTX
from .lumina2 import Lumina2
from .pixart import PixArt
from .qwen_image import QwenImage
from .sana import Sana, SanaSprint
from .sd import SD
from .sd3 import SD3
from .sdxl import SDXL
from .wan import Wan
from .z_image import ZImage

FAMILIES: dict[str, type[Family]] = {
    "StableDiffusionPipeline": SD,
    "StableDiffusionXLPipeline": SDXL,
    "StableDiffusion3Pipeline": SD3,
    "FluxPipeline": Flux,
    "Flux2Pipeline": Flux2,
    "Flux2KleinPipeline": Flux2Klein,
    "PixArtSigmaPipeline": PixArt,
    "SanaPipeline": Sana,
    "SanaSprintPipeline": SanaSprint,
    "QwenImagePipeline": QwenImage,
    "ZImagePipeline": ZImage,
    "Lumina2Pipeline": Lumina2,
    "WanPipeline": Wan,
    "LTXPipeline": LTX,
    "CogVideoXPipeline": CogVideoX,
    "HunyuanVideoPipeline": HunyuanVideo,
}
