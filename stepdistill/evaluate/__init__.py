"""How good pictures are: Frechet distance, alignment with captions, diversity. Nothing here enters training."""

from .frechet import frechet, frechet_interval, moments
from .readings import Alignment, Diversity, alignment, diversity, match
from .tiny import Result, evaluate_tiny, floor, prompts, reference

__all__ = [
    "Alignment",
    "Diversity",
    "Result",
    "alignment",
    "diversity",
    "evaluate_tiny",
    "floor",
    "frechet",
    "frechet_interval",
    "match",
    "moments",
    "prompts",
    "reference",
]
