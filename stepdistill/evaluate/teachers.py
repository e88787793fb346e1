"""Measures the embedded teachers' own figures (see `shipped`).

    python -m stepdistill.evaluate.teachers stepdistill/tiny-sd --guidance 3

measures them anew, in half an hour (tiny-sd) to an hour (tiny-sd3) on one core, and writes
`stepdistill/tiny/<teacher>/figures.json`, keyed by the hash of the teacher's files.
"""

from __future__ import annotations

import argparse
import json

from ..assemble import assemble
from ..recipe import load_recipe
from ..show import Line
from ..sources import embedded_models
from .shipped import key
from .table import provenance, render, teacher_rows
from .tiny import floor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", choices=tuple(embedded_models()))
    parser.add_argument("--guidance", type=float, required=True, help="the scale of the guided rows")
    parser.add_argument("--n", type=int, default=2048, help="pictures a figure")
    options = parser.parse_args()
    line, folder = Line(), embedded_models()[options.source]
    teacher = assemble(load_recipe("quickstart", [f"model.source={options.source}"]))
    rows = []
    for row in teacher_rows(teacher, options.guidance, options.n, line):  # written after each: the last ones take longest
        rows.append(row)
        made = {"key": key(folder), "n": options.n, "rows": rows, "provenance": provenance(teacher)}
        (folder / "figures.json").write_text(json.dumps(made, indent=1))
    line.say(render(rows, floor(options.n)[0]))


if __name__ == "__main__":
    main()
