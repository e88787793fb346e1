"""The strategies by their YAML names."""

from .base import Strategy
from .boot import BOOT
from .dmd import DMD
from .dmd2 import DMD2
from .f_distill import FDistill
from .lcm import LCM
from .phased_dmd import PhasedDMD
from .rcm import RCM
from .reflow import Reflow
from .scm import SCM
from .tscd import TSCD
from .vsd import VSD

STRATEGIES: dict[str, type[Strategy]] = {
    "boot": BOOT,
    "dmd": DMD,
    "dmd2": DMD2,
    "f_distill": FDistill,
    "lcm": LCM,
    "phased_dmd": PhasedDMD,
    "rcm": RCM,
    "reflow": Reflow,
    "scm": SCM,
    "tscd": TSCD,
    "vsd": VSD,
}
