"""Figures from a GPU, one part a file; README.md beside this tells what is measured and how.

python benchmarks/gpu/run.py --part attention          # every row, as far as --seconds reach; again goes on
python benchmarks/gpu/run.py --part attention --tune   # tiles of the kernel against each other
python benchmarks/gpu/run.py --part attention --dry    # the same path at toy sizes, without a GPU: no measurement
python benchmarks/gpu/run.py --plot attention.json     # table, targets and picture again, from the figures
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
PARTS = ("attention",)  # modules beside this one, each with measure, tune and show


def main(words: list[str] | None = None) -> None:
    started = time.monotonic()  # torch is imported below: its time counts too
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--part", choices=PARTS)
    what.add_argument("--plot", type=Path, metavar="FILE.json", help="measure nothing; show what this file holds")
    parser.add_argument("--tune", action="store_true", help="sweep the part's tunable choices instead")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of the JSON and the picture; beside this script by default")
    parser.add_argument("--seconds", type=float, default=460.0, help="stop before so many, counted from the start (460)")
    parser.add_argument("--commit", help="of the code, where the checkout's git cannot be asked")
    parser.add_argument("--dry", action="store_true", help="toy sizes on the CPU, into a temporary folder by default")
    given = parser.parse_args(words)

    import measure

    if given.plot:
        results = measure.read(given.plot)
        importlib.import_module(results["part"]).show(results, given.plot)
        return
    out = given.out or (Path(tempfile.mkdtemp(prefix="stepdistill-dry-")) if given.dry else HERE)
    out.mkdir(parents=True, exist_ok=True)
    part = importlib.import_module(given.part)
    path = out / f"{given.part}{'_tiles' if given.tune else ''}{'_dry' if given.dry else ''}.json"
    on = measure.Host() if given.dry else measure.Gpu()
    (part.tune if given.tune else part.measure)(on, path, started + given.seconds, given.commit)


if __name__ == "__main__":
    sys.exit(main())
