"""Pipeline families by the name of their diffusers pipeline."""

from .base import Family
from .flux import Flux
from .sd import SD
from .sd3 import SD3
from .sdxl import SDXL
from .wan import Wan

FAMILIES: dict[str, type[Family]] = {
    "StableDiffusionPipeline": SD,
    "StableDiffusionXLPipeline": SDXL,
    "StableDiffusion3Pipeline": SD3,
    "FluxPipeline": Flux,
    "WanPipeline": Wan,
}
