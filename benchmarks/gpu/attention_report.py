"""What the figures of attention say: the table, the targets line by line, and the picture."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attention_cases import CONSTANT, Case
from attention_providers import FLASH, KERNEL, MATH, RIVAL
from plot import Bar, bars

if TYPE_CHECKING:
    from PIL import Image

Rows = dict[str, dict[str, Any]]
ERROR = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-5}  # what the kernel's may be, relative to float64


def ms(row: dict[str, Any], *names: str) -> float | None:
    """The quickest of these providers; None if none of them was measured."""
    found = [row["providers"][name]["ms"] for name in names if "ms" in row["providers"].get(name, ())]
    return min(found, default=None)


def ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def excess(row: dict[str, Any]) -> float | None:
    """The kernel's larger error over what it may be."""
    made = row["providers"].get(KERNEL, {})
    if "error_to" not in made:
        return None
    errors = (made["error_o"], made["error_to"])
    return math.inf if None in errors else max(errors) / ERROR[row["case"]["dtype"]]


def fails(row: dict[str, Any]) -> bool:
    """Whether the kernel was tried, and gave no result or a wrong one."""
    return "skipped" in row["providers"].get(KERNEL, ()) or (excess(row) or 0) > 1


def share(name: str, rows: Rows) -> float | None:
    return rows[name]["providers"].get(KERNEL, {}).get("share")


def of_full(name: str, rows: Rows) -> float | None:
    """The kernel's time with constant k and v, of its time with all tangents."""
    full = rows.get(name.removesuffix(CONSTANT))
    return ratio(ms(rows[name], KERNEL), ms(full, KERNEL)) if full else None


@dataclass(frozen=True)
class Target:
    """A bound on a value of the rows of some cases; the worst of them decides."""

    told: str
    side: str  # "at least" or "at most"
    must: float
    stretch: float | None
    of: Callable[[Case], bool]
    value: Callable[[str, Rows], float | None]  # of a row by name, None where it was not measured

    def verdict(self, rows: Rows) -> dict[str, str]:
        here = [name for name, row in rows.items() if self.of(Case(**row["case"]))]
        values = {name: value for name in here if (value := self.value(name, rows)) is not None}
        bad = [name for name in here if fails(rows[name])]
        told, least = [], self.side == "at least"
        if values:
            worst = (min if least else max)(values, key=values.get)
            told.append(f"{values[worst]:.3g} in {worst!r}, the worst of {len(values)} rows")
        if bad:
            told.append(f"no result or a wrong one in {', '.join(map(repr, bad))}")
        met = told and not bad and (values[worst] >= self.must if least else values[worst] <= self.must)
        stretch = f" (stretch {self.stretch:g})" if self.stretch else ""
        return {
            "target": f"{self.told}: {self.side} {self.must:g}{stretch}",
            "verdict": "met" if met else "missed" if told else "not measured",
            "told": "; ".join(told),
        }


def long(case: Case, dims: tuple[int, ...] = (64, 72, 128), tangents: str = "111") -> bool:
    """A shape of at least 4096 tokens in bfloat16, and nothing else about it."""
    tokens = min(case.queries, case.keys)
    return case.plain and case.dtype == "bfloat16" and tokens >= 4096 and case.dim in dims and case.tangents == tangents


TARGETS = (
    Target(
        "error against float64, over what the precision allows", "at most", 1, None,
        lambda case: True, lambda name, rows: excess(rows[name]),
    ),
    Target(
        "share of the dense matrix rate, D 128, 4096 tokens or more", "at least", 0.65, 0.75,
        lambda case: long(case, (128,)), share,
    ),
    Target(
        "share of the dense matrix rate, D 64, 4096 tokens or more", "at least", 0.58, None,
        lambda case: long(case, (64,)), share,
    ),
    Target(
        "times the flash forward", "at most", 2.6, 2.2,
        lambda case: long(case, (64, 128)), lambda name, rows: ratio(ms(rows[name], KERNEL), ms(rows[name], FLASH)),
    ),
    Target(
        "constant k and v, times all tangents, 4096 tokens or more", "at most", 0.8, None,
        lambda case: long(case, tangents="100"), of_full,
    ),
    Target(
        "77 constant keys, times a copy of their bytes", "at most", 1.6, None,
        lambda case: case.keys == 77, lambda name, rows: rows[name]["providers"].get(KERNEL, {}).get("copies"),
    ),
    Target(
        "times faster than jvp-flash-attention as shipped", "at least", 4, None,
        long, lambda name, rows: ratio(ms(rows[name], *RIVAL), ms(rows[name], KERNEL)),
    ),
    Target(
        "times faster than the math JVP", "at least", 3.5, None,
        long, lambda name, rows: ratio(ms(rows[name], *MATH), ms(rows[name], KERNEL)),
    ),
)  # fmt: skip


def targets(results: dict[str, Any]) -> list[dict[str, str]]:
    """Each target: what it is, met, missed or not measured, and by what."""
    return [target.verdict(results["rows"]) for target in TARGETS]


def lines(name: str, row: dict[str, Any]) -> list[str]:
    """A row as text: a line for each provider."""
    told = [f"{name}: {row['tflop']:.3g} TFLOP, {row['bytes'] / 1e6:.4g} MB"]
    for who, made in row["providers"].items():
        if "skipped" in made:
            told.append(f"  {who:30} - {made['skipped']}")
            continue
        rates = f"{made['tflops']:6.1f} TFLOP/s {made['share']:4.0%}" if "share" in made else " " * 19
        copies = f"  {made['copies']:.2f} copies" if "copies" in made else ""
        errors = [f"{what} {_error(made[f'error_{what}'])}" for what in ("o", "to") if f"error_{what}" in made]
        peak = f", {made['peak_mb']:.0f} MB" if made["peak_mb"] is not None else ""
        times = f"{made['ms']:9.4f} ms ({made['p10']:.4f} .. {made['p90']:.4f}, {made['reps']})"
        told.append(f"  {who:30}{times} {rates}{copies}  {' '.join(errors)}  first {made['first_ms'] / 1e3:.2f} s{peak}")
    return told


def _error(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.1e}"


def show(results: dict[str, Any], path: Path, table: bool = True) -> None:
    """Print the table and the targets, and draw the picture beside the JSON if there is pillow."""
    if table:
        print("\n".join(line for name, row in results["rows"].items() for line in lines(name, row)))
    last = results["runs"][-1]
    print("dense matrix rate, before and after: " + ", ".join(f"{rate:.1f} TFLOP/s" for rate in last["matmul_tflops"]))
    if last["not_reached"]:
        print(f"not reached: {'; '.join(last['not_reached'])}")
    for target in targets(results):
        print(f"{target['verdict']:14}{target['target']}" + f" - {target['told']}" * bool(target["told"]))
    try:
        picture(results).save(path.with_suffix(".png"))
    except ImportError:
        print("no pillow here: --plot draws the picture elsewhere")
    print(f"figures: {path}" + ", of a dry run, which measures nothing" * results["dry"])


def picture(results: dict[str, Any]) -> Image.Image:
    """Operations a second of everyone in every row, those that count (6 products, or fewer; a forward's 2), and the times."""
    groups = {}
    for name, row in results["rows"].items():
        made = {who: figures for who, figures in row["providers"].items() if "tflops" in figures}
        if made:
            groups[name] = [Bar(who, figures["tflops"], f"{figures['ms']:.3g} ms") for who, figures in made.items()]
    first = "DRY RUN at toy sizes, no measurement: " if results["dry"] else ""
    run = results["runs"][-1]
    title = f"{first}attention and its JVP, {results['device']}, torch {results['torch']}, commit {run['commit']}"
    return bars(title, groups, run["matmul_tflops"][0], "TFLOP/s, dense product")
