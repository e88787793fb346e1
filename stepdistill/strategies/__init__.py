"""The strategies by their YAML names."""

from .base import Strategy
from .dmd2 import DMD2
from .lcm import LCM

STRATEGIES: dict[str, type[Strategy]] = {
    "dmd2": DMD2,
    "lcm": LCM,
}
