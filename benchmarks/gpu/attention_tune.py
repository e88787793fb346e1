"""Tiles of the kernel against each other, for each variant that is compiled apart."""

from __future__ import annotations

import importlib
import itertools
import math
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from attention_cases import LARGE, Case, Inputs, draw, trial, truth
from attention_report import ERROR
from measure import Gpu, Host, begin, kernels, save, take_turns, told
from torch import Tensor

Tile = tuple[int, int, int, int]  # queries, keys, stages, warps
VARIANTS = tuple(
    replace(LARGE, name=f"D {dim}{', constant k v' * (tangents == '100')}{', ' + dtype if dtype != 'bfloat16' else ''}",
            dim=dim, tangents=tangents, dtype=dtype, heads=heads)
    for dtype, dim, heads, tangents in (
        *itertools.product(("bfloat16",), (128, 64), (24,), ("111", "100")),
        *itertools.product(("bfloat16",), (72,), (16,), ("111", "100")),
        *itertools.product(("float16",), (128, 64), (24,), ("111",)),
        ("float32", 64, 10, "111"),
    )
)  # fmt: skip


def kernel(tile: Tile, case: Case, x: Inputs) -> tuple[Tensor, ...]:
    """o and `to` by the kernel with this tile: the one place that knows how a tile is asked for."""
    kernels()
    launch, tiles = (importlib.import_module(f"stepdistill_kernels.{name}") for name in ("launch", "tiles"))
    *given, lens = x
    o, to = torch.empty_like(x.q), torch.empty_like(x.q)
    launch.forward(*given, None, lens, 1 / math.sqrt(case.dim), case.causal, o, to, tile=tiles.Tile(*tile))
    return o, to


def stand_in(tile: Tile, case: Case, x: Inputs) -> tuple[Tensor, ...]:
    """The same by the reference, for a dry run: what a tile is to the kernel, its workspace is to it."""
    kernels()
    reference = importlib.import_module("stepdistill_kernels.reference")
    *given, lens = x
    made = reference.attention_jvp(*given, None, lens, 1 / math.sqrt(case.dim), case.causal, workspace=tile[0] * tile[1])
    return tuple(t.to(x.q.dtype) for t in made[:2])


def tiles(case: Case) -> list[Tile]:
    """Those that may fit: two accumulators and two tiles of logits in registers, what the stages hold in shared memory."""
    wide, q_and, k_and = (4 if case.dtype == "float32" else 2), 1 + int(case.tangents[0]), 2 + case.tangents[1:].count("1")
    width = 16 * math.ceil(case.dim / 16)

    def fits(tile: Tile) -> bool:
        queries, keys, stages, warps = tile
        registers = 2 * queries * (width + keys) / (32 * warps)
        shared = wide * width * (q_and * queries + stages * k_and * keys)
        return registers <= 192 and shared <= 227 * 1024

    sides = ((16, 32, 64), (16, 32), (1, 2)) if wide == 4 else ((64, 128), (32, 64, 128), (2, 3, 4))  # no tensor cores: small
    return [tile for tile in itertools.product(*sides, (4, 8)) if fits(tile)]


@torch.no_grad()
def tune(on: Gpu | Host, path: Path, until: float, commit: str | None = None) -> None:
    """Every variant that is not in the file yet, until the time (by time.monotonic) is near; the winners are under `best`."""
    results, longest = begin(on, path, "attention_tune", commit), 0.0
    for case in VARIANTS:
        start = time.monotonic()
        if case.name in results["rows"] or start + longest > until:
            continue
        results["rows"][case.name] = made = sweep(on, case.toy() if on.dry else case, tiles(case))
        longest = max(longest, time.monotonic() - start)
        save(results, path)
        print("\n".join(lines(case.name, made)), flush=True)
    print(f"figures: {path}" + ", of a dry run, which measures nothing" * on.dry)


def sweep(on: Gpu | Host, case: Case, candidates: list[Tile]) -> dict[str, Any]:
    """Each tile's time, or why it has none: it does not compile, or its results are wrong."""
    x = draw(case, on.device)
    want, compute = truth(case, x, kernels().attention_jvp), stand_in if on.dry else kernel
    found, works = {}, {}
    for tile in candidates:
        name, work = "x".join(map(str, tile)), lambda tile=tile: compute(tile, case, x)
        try:
            found[name] = trial(on, work, x, want)
        except Exception as error:  # of the compiler: registers, shared memory
            found[name] = {"skipped": told(error)}
            continue
        errors = found[name]["error_o"], found[name]["error_to"]
        if None in errors or max(errors) > ERROR[case.dtype]:
            found[name]["skipped"] = "wrong"
        else:
            works[name] = work
    times = take_turns(on, works) if works else {}
    for name, made in times.items():
        found[name] |= made | {"tflops": case.tflop(case.products) / made["ms"] * 1e3}
    best = min(times, key=lambda name: times[name]["ms"], default=None)
    return {"case": asdict(case), "state": on.state(), "tiles": found, "best": best}


def lines(name: str, made: dict[str, Any]) -> list[str]:
    told = [f"{name}: {made['best']}"]
    for tile, figures in sorted(made["tiles"].items(), key=lambda item: item[1].get("ms", math.inf)):
        if "skipped" in figures:
            told.append(f"  {tile:14} - {figures['skipped']}")
        else:
            told.append(f"  {tile:14}{figures['ms']:9.4f} ms ({figures['p10']:.4f} .. {figures['p90']:.4f})")
    return told


def show(results: dict[str, Any], path: Path) -> None:
    """Print every variant's tiles, the quickest first."""
    print("\n".join(line for name, made in results["rows"].items() for line in lines(name, made)))
