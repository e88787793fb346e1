"""Makes what is embedded, from nothing.

    python -m stepdistill.tiny.make judge autoencoder decoder text latents sd sd3 pack --work build/tiny

Each stage reads what earlier stages left in the work folder, prints a line every few seconds, and resumes where it was
stopped. After a new judge, `python -m stepdistill.evaluate` remakes the reference; after new teachers,
`python -m stepdistill.evaluate.teachers` their figures.

Settings are the stages' defaults. What ships took, on one core of a 2-core machine (torch 2.13, AVX2): judge 17 min,
autoencoder 20 min, decoder 11 min, text 4 min, latents 3 min, sd 3 h 25 min (in three sittings that each cooled: 4,100 steps,
on to 12,600, on to 15,500), sd3 3 h 16 min (its first 1,000 steps were AdamW's alone).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from . import autoencoder, judge, pack, teachers, text

STAGES: dict[str, Callable[[Path], None]] = {
    "judge": judge.make_judge,
    "autoencoder": autoencoder.make_autoencoder,
    "decoder": autoencoder.make_decoder,
    "text": text.make_text,
    "latents": teachers.make_latents,
    "sd": teachers.make_sd,
    "sd3": teachers.make_sd3,
    "pack": pack.pack,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m stepdistill.tiny.make",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stages", nargs="+", choices=tuple(STAGES))
    parser.add_argument("--work", type=Path, default=Path("build/tiny"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    for stage in options.stages:
        STAGES[stage](options.work)


main()
