"""Attention and its Jacobian-vector product: a row for each case, with everyone who can compute it."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from attention_cases import CASES, Case, draw, trial, truth
from attention_providers import COPY, providers
from attention_report import lines, show, targets
from attention_tune import tune
from measure import Gpu, Host, begin, copy_gb_s, kernels, matmul_tflops, save, take_turns, told, version

__all__ = ["measure", "show", "tune"]


@torch.no_grad()
def measure(on: Gpu | Host, path: Path, until: float, commit: str | None = None) -> None:
    """Every case that is not in the file yet, the most important first, until the time (by time.monotonic) is near."""
    results = begin(on, path, "attention", commit)
    run = results["runs"][-1]
    ceiling = matmul_tflops(on)
    run |= {"matmul_tflops": [ceiling], "copy_gb_s": copy_gb_s(on), "rival": version("jvp_flash_attention")}
    print(f"ceilings: {ceiling:.0f} TFLOP/s, {run['copy_gb_s']:.0f} GB/s", flush=True)
    longest = 0.0
    for case in CASES:
        start = time.monotonic()
        if case.name in results["rows"] or start + longest > until:
            continue
        made = row(on, case.toy() if on.dry else case, ceiling)
        longest = max(longest, time.monotonic() - start)
        results["rows"][case.name] = made | {"run": len(results["runs"]) - 1, "seconds": round(time.monotonic() - start, 1)}
        save(results, path)
        print("\n".join(lines(case.name, made)), flush=True)
        if not on.alive():
            print("this process lost the device; the same command goes on with the next row")
            break
    else:
        run["matmul_tflops"].append(matmul_tflops(on))
    run["not_reached"] = [case.name for case in CASES if case.name not in results["rows"]]
    results["targets"] = targets(results)
    save(results, path)
    show(results, path, table=False)


def row(on: Gpu | Host, case: Case, ceiling: float) -> dict[str, Any]:
    """One case: times, rates and their share of the ceiling (TFLOP/s), errors, memory; or why there are none."""
    x = draw(case, on.device)
    want = truth(case, x, kernels().attention_jvp)
    found, works = {}, {}
    for provider in (who := providers(on)):
        reason = provider.why_not(case, on) or (None if on.alive() else "the device was lost before")
        if reason is None:
            try:
                work = provider.make(case, x)
                found[provider.name] = trial(on, work, x, None if provider.name == COPY else want)
                works[provider.name] = work
                continue
            except Exception as error:  # whatever is raised is this provider's answer to the case
                reason = told(error)
        found[provider.name] = {"skipped": reason}
    try:
        times = take_turns(on, works) if works else {}
    except RuntimeError as error:  # of the device
        times, found = {}, found | {name: {"skipped": told(error)} for name in works}
    for provider in (each for each in who if each.name in times):
        made = found[provider.name] = found[provider.name] | times[provider.name]
        if products := case.products if provider.products is None else provider.products:
            made["tflops"] = case.tflop(products) / made["ms"] * 1e3
            made["share"] = made["tflops"] / ceiling
        if COPY in times:
            made["copies"] = made["ms"] / times[COPY]["ms"]
    figures = {"tflop": case.tflop(case.products), "bytes": case.bytes}
    return {"case": asdict(case), **figures, "state": on.state(), "providers": found}
