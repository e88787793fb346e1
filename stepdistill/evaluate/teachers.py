"""Measures the embedded teachers' own figures (see `shipped`).

    python -m stepdistill.evaluate.teachers stepdistill/tiny-sd --guidance 3

measures them anew, in 5 minutes (tiny-sd) to 10 (tiny-sd3) on one core, and writes `stepdistill/tiny/<teacher>/figures.json`,
keyed by the hash of the teacher's files. The best solver of each row is taken from the figures before, where there are such;
after a new teacher remove the file: then every solver is tried, in half an hour to an hour.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from ..assemble import assemble
from ..data.texts import Texts
from ..recipe import load_recipe
from ..show import Line
from ..sources import embedded_models
from . import provenance, tiny
from .bench import Bench, row
from .presets import tiny_suite
from .rivals import best_known, nearest, of_the_world
from .shipped import NAME, key, shipped
from .table import render

HERE = ("ms", "ms_low", "ms_high", "memory_mib", "machine", "key")  # of a row: true on this machine alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", choices=tuple(embedded_models()))
    parser.add_argument("--guidance", type=float, required=True, help="the scale of the guided rows")
    parser.add_argument("--n", type=int, default=tiny.PICTURES, help="pictures a figure")
    parser.add_argument("--work", type=Path, help="a folder in which an interrupted measurement goes on")
    options = parser.parse_args()
    line, folder = Line(), embedded_models()[options.source]
    settings = [f"model.source={options.source}", f"strategy.guidance={options.guidance}"]
    teacher = assemble(load_recipe("quickstart", settings))
    suite = tiny_suite(options.n)
    told = provenance.told(teacher) | {"floor": tiny.floor(options.n)[0]}
    about = {"compared": suite.compared, "told": told}
    before = (shipped(options.source) or {"rows": []})["rows"]
    tried = {(row["steps"], row["guidance"]): row["tried"] for row in before}
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(teacher, suite, options.work or Path(scratch), line, 64, Texts(teacher.family))
        rivals = list(of_the_world(bench, best_known(before)))
        model = nearest(bench, [candidate for candidate, _ in rivals], {})
        rows = []
        for candidate, more in rivals:
            more = more or {"tried": tried[candidate.steps, candidate.guidance]}
            rows.append(row(bench, candidate, model, None) | more)
            line.say(render(rows[-1:], about).splitlines()[3])
    kept = [{name: value for name, value in row.items() if name not in HERE} for row in rows]
    (folder / NAME).write_text(json.dumps({"key": key(folder), "rows": kept, "provenance": about}, indent=1))
    line.say(render(rows, about))


if __name__ == "__main__":
    main()
