"""Pipeline families by the name of their diffusers pipeline."""

from .base import Family
from .sd import SD
from .sd3 import SD3

FAMILIES: dict[str, type[Family]] = {
    "StableDiffusionPipeline": SD,
    "StableDiffusion3Pipeline": SD3,
}
