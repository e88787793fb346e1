"""The kernel compiled for chips that are not here; and the page that shows what became of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "jvp.md"
BEGIN, END = "<!-- written by tests/kernels/test_offline.py -->\n", "<!-- end -->"


def compile_all() -> str:
    """In a process of its own: here, kernels are for the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "stepdistill_kernels.offline"]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


@pytest.mark.long
def test_nothing_spills_and_the_page_says_what_was_compiled():
    told = compile_all()
    names, _, *rows = (line.strip("|").split("|") for line in told.splitlines() if line.startswith("|"))
    rows = [dict(zip((name.strip() for name in names), (cell.strip() for cell in row), strict=True)) for row in rows]
    for row in rows:
        hopper = row["chip"] == "sm_90"
        assert int(row["shared memory"].removesuffix(" KiB")) <= (227 if hopper else 99), row
        assert not hopper or int(row["wgmma"]) > 0, row
        if row["D"] in ("64", "128"):
            assert row["spilled"] == "0 B", row
    for d in ("64", "128"):
        here = [row for row in rows if row["D"] == d and row["chip"] == "sm_90"]
        assert {row["tangents"] for row in here} == {"111", "110", "100", "011", "001"}
        for tangents in ("111", "100"):
            asked = {row["besides"] for row in here if row["tangents"] == tangents}
            assert asked >= {"", "even lengths", "causal", "key lengths", "mask (key)", "mask (query)", "mask (boolean, query)"}

    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    after = rest.split(END, 1)[1]
    if (fresh := f"{before}{BEGIN}{told}{END}{after}") != page:
        PAGE.write_text(fresh, encoding="utf-8")
        pytest.fail(f"{PAGE.name} showed other figures; it has been rewritten")
