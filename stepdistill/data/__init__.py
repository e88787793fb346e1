"""From prompts and pictures to batches: encoded once, then every batch is a pure function of the step."""

from .batches import Batches
from .build import build_batches

__all__ = ["Batches", "build_batches"]
