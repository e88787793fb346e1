"""What several GPUs would gain: on paper and by simulation; and two processes, measured, as a check.

    python benchmarks/scale.py             # measures (minutes, on 2 quiet cores), computes, writes scale.json and the page
    python benchmarks/scale.py --compute   # computes anew from the measured part of scale.json

An iteration takes t = a + b * rows of computing on each process, and what `stepdistill.communication` says that a ring takes
to send. Measured: the quickstart's a, b and their scatter on a core of this machine, and sending between two processes on it.
Of large models nothing was measured: their operations and bytes are counted by `stepdistill plan` on the real architecture,
and a GPU's pace and links are assumed, as listed in ASSUMED.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from stepdistill.communication import Call, Link, replicated, seconds, sent

HERE = Path(__file__).resolve()
RESULTS, PAGE = HERE.with_suffix(".json"), HERE.parents[1] / "docs" / "scale.md"
PLOT = PAGE.with_suffix(".png")
BEGIN, END = "<!-- measured: benchmarks/scale.py -->", "<!-- end of measured -->"
OVERRIDES = ["data.count=64", "train.batch=16", "train.ema=0.95", "eval.every=0"]
ROWS = (2, 4, 8, 16)  # samples of a process
WORLDS = (1, 2, 4, 8, 16, 32, 64)
MACHINE = 8  # GPUs of one
FIXED = 256  # samples of an iteration, where their number is fixed
NVLINK, PCIE = "NVLink 4", "PCIe 4.0 x16"
BETWEEN = ("InfiniBand, 8 x 400 Gb/s", "Ethernet, 100 Gb/s")  # machines
HOW = ("null", "full", "hybrid")  # train.shard
ASSUMED = {
    "operations a second of a GPU": 989e12,  # the maker's figure: H100 SXM, bf16, dense
    "share of them that training reaches": 0.35,  # assumed
    "links": {  # bytes a second to the neighbour (the makers' figures, for one direction), and seconds of latency (assumed)
        NVLINK: (450e9, 5e-6),
        PCIE: (32e9, 10e-6),
        BETWEEN[0]: (400e9, 20e-6),
        BETWEEN[1]: (12.5e9, 50e-6),
    },
}
MODELS = ("dmd2_sdxl", "dmd2_flux")  # recipes that are looked at


def step_times(rows: int, steps: int) -> dict[str, Any]:
    """Seconds of steps of this process, of the quickstart with so many samples on each, and where they went."""
    from stepdistill import distributed, load_recipe
    from stepdistill.assemble import assemble
    from stepdistill.data import build_batches
    from stepdistill.trainer import Trainer

    recipe = load_recipe("quickstart", [*OVERRIDES, f"train.batch={rows * distributed.world()}"])
    made = assemble(recipe)
    trainer = Trainer(made, build_batches(recipe, made.family))
    times = []
    for _ in range(steps + 3):
        began = time.perf_counter()
        trainer.step()
        times.append(time.perf_counter() - began)
    moves = {who: (sum(p.numel() for p in params), 1.0) for who, params in trainer.params.items()}
    return {"rows": rows, "seconds": times[3:], "moves": moves}


def ring_times(steps: int) -> dict[str, float]:
    """Seconds of an all-reduce between these processes, by bytes: the median."""
    import torch
    import torch.distributed as dist

    found = {}
    for size in (4_000, 1_000_000, 4_000_000, 16_000_000):
        x, times = torch.zeros(size // 4), []
        for _ in range(steps):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(x)
            times.append(time.perf_counter() - began)
        found[str(size)] = statistics.median(times)
    return found


def work(job: str, out: Path) -> None:
    """What one process of several measures."""
    import torch

    from stepdistill import distributed

    torch.set_num_threads(1)
    distributed.state()
    rows, steps = map(int, job.split(","))
    made = step_times(rows, steps) | ({"ring": ring_times(20)} if distributed.world() > 1 else {})
    if distributed.rank() == 0:
        out.write_text(json.dumps(made))


def together(processes: int, rows: int, steps: int) -> dict[str, Any]:
    """The measurement of so many processes at once, each on a core of its own where there are as many."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out, running = Path(folder) / "out.json", []
        for rank in range(processes):
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            variables = os.environ | ({name: str(value) for name, value in names.items()} if processes > 1 else {})
            command = [sys.executable, str(HERE), "--work", f"{rows},{steps}", "--out", str(out)]
            running.append(subprocess.Popen(command, env=variables, cwd=folder))
        for process in running:
            if process.wait():
                raise SystemExit(f"a process of {processes} failed")
        return json.loads(out.read_text())


def measure() -> dict[str, Any]:
    """One process with different numbers of samples, and two with half of the most each."""
    one = {str(rows): together(1, rows, 16) for rows in ROWS}
    two = together(2, ROWS[-1] // 2, 30)
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load": os.getloadavg()[0],
        "one": {rows: made["seconds"] for rows, made in one.items()},
        "two": {"rows": two["rows"], "seconds": two["seconds"]},
        "ring": two["ring"],
        "moves": two["moves"],
    }


def line_through(points: dict[float, float]) -> tuple[float, float]:
    """Intercept and slope by least squares."""
    (slope, intercept) = statistics.linear_regression(list(points), list(points.values()))
    return intercept, slope


def checked(measured: dict[str, Any]) -> dict[str, float]:
    """The simulator against two processes: what it expects of them, and what they took."""
    a, b = line_through({float(rows): statistics.median(times) for rows, times in measured["one"].items()})
    late, each = line_through({float(size): t for size, t in measured["ring"].items()})  # two hops of half the bytes each
    link = Link(latency=max(late, 0.0) / 2, bandwidth=1 / each)
    calls = replicated(measured["moves"])
    rows, ratio = measured["two"]["rows"], statistics.median(measured["two"]["seconds"])
    expected = a + b * rows + seconds(calls, 2, link)
    whole = a + b * 2 * rows
    return {
        "a": a,
        "b": b,
        "latency": link.latency,
        "bandwidth": link.bandwidth,
        "bytes": sent(calls, 2),
        "expected": expected,
        "taken": ratio,
        "speedup expected": whole / expected,
        "speedup measured": whole / ratio,
    }


def stragglers(measured: dict[str, Any], processes: int, draws: int = 2000) -> float:
    """How many times the median step the slowest of so many processes takes on average, each with a step drawn from those that
    were measured: all wait for it."""
    times = measured["one"][str(ROWS[-1])]
    dice = random.Random(0)
    return statistics.mean(max(dice.choices(times, k=processes)) for _ in range(draws)) / statistics.median(times)


def counted(name: str) -> dict[str, Any]:
    """Operations and calls of an iteration of a recipe of a large model."""
    from stepdistill import load_recipe
    from stepdistill.plan import make_plan

    plan = make_plan(load_recipe(name))
    adapters, weights = ([call._asdict() for call in calls] for calls in plan.calls().values())
    train = plan.recipe.train
    return {"flops a sample": plan.flops / train.batch, "parts": train.accumulate, "adapters": adapters, "weights": weights}


def calls_of(model: dict[str, Any], rows: float) -> tuple[list[Call], list[Call]]:
    """Those of an iteration for adapters, and for weights in shares: gathered in every pass, that is with every sample."""
    weights = [Call(**call) for call in model["weights"]]
    return [Call(**call) for call in model["adapters"]], [c._replace(times=c.times / model["parts"] * rows) for c in weights]


def iteration(model: dict[str, Any], how: str, link: str, processes: int, rows: float) -> tuple[float, float]:
    """Seconds of computing and of sending, where each process has so many samples, one at a time, in an iteration.

    link: between all, or within a machine only, if there are more processes: see `route`.
    """
    pace = ASSUMED["operations a second of a GPU"] * ASSUMED["share of them that training reaches"]
    adapters, weights = calls_of(model, rows)
    links = {name: Link(latency, bandwidth) for name, (bandwidth, latency) in ASSUMED["links"].items()}
    sending = seconds(adapters, processes, links[link])
    if how == "full":
        sending += seconds(weights, processes, links[link])
    if how == "hybrid":
        sending += seconds(weights, min(processes, MACHINE), links[NVLINK])
    return model["flops a sample"] * rows / pace, sending


def share(model: dict[str, Any], how: str, link: str, processes: int, rows: float = 1) -> float:
    """Of its time in which a GPU computes, if nothing overlaps."""
    computing, sending = iteration(model, how, link, processes, rows)
    return computing / (computing + sending)


def route(link: str, processes: int) -> str:
    """The slowest link of a ring over machines that `link` connects, with NVLink inside."""
    return NVLINK if processes <= MACHINE else link


def worth(model: dict[str, Any], how: str, link: str) -> int:
    """The most GPUs at which computing takes no less than sending, where an iteration has FIXED samples in all."""
    fine = [n for n in (2**k for k in range(9)) if share(model, how, route(link, n), n, FIXED / n) >= 0.5]
    return max(fine)


def compute(measured: dict[str, Any], models: dict[str, Any]) -> dict[str, Any]:
    """All that follows from what was measured, counted and assumed."""
    paper = []
    for name, model in models.items():
        cases = [(how, link, MACHINE) for how in HOW[:2] for link in (NVLINK, PCIE)]
        cases += [(how, link, 64) for how in HOW for link in BETWEEN]
        for how, link, n in cases:
            adapters, weights = calls_of(model, 1)
            gb = sent(adapters, n) + (sent(weights, n if how == "full" else min(n, MACHINE)) if how != "null" else 0)
            found = {"GB": gb / 1e9, "computes": share(model, how, link, n)}
            most = worth(model, how, link) if link in BETWEEN else None
            paper.append({"recipe": name, "shard": how, "link": link, "GPUs": n, **found, "worth": most})
    curves = {
        f"{name}: {how}, {link}": {str(n): share(model, how, route(link, n), n) for n in WORLDS}
        for name, model in models.items()
        for how in HOW
        for link in BETWEEN
    }
    slowest = {str(n): stragglers(measured, n) for n in WORLDS}
    return {"check": checked(measured), "slowest": slowest, "paper": paper, "curves": curves}


def table(results: dict[str, Any]) -> str:
    """What the page shows."""
    made, check = results["computed"], results["computed"]["check"]
    slowest = ", ".join(f"{made['slowest'][n]:.2f}" for n in ("2", "8", "64"))
    link = f"{check['latency'] * 1e3:.2f} ms, {check['bandwidth'] / 1e9:.2f} GB/s"
    rows = {
        "a step of one process, 16 samples": f"{check['a'] + 16 * check['b']:.3f} s = {check['a']:.3f} + 16 x {check['b']:.4f}",
        "sent by each of two processes in an iteration": f"{check['bytes'] / 1e6:.2f} MB",
        "between them: latency, bandwidth (gloo, loopback)": link,
        "two processes, 8 samples each: simulated": f"{check['expected']:.3f} s, x {check['speedup expected']:.2f}",
        "two processes, 8 samples each: measured": f"{check['taken']:.3f} s, x {check['speedup measured']:.2f}",
        "the slowest of 2, 8, 64 steps drawn from those measured": f"{slowest} x the median",
    }
    lines = ["| | value |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())]
    lines += [
        "",
        f"Measured on {results['measured']['machine']}, at a load of {results['measured']['load']:.1f}"
        " (above 2, others worked there too, and what two processes took says little).",
        "",
        f"| recipe | `train.shard` | slowest link | GPUs | GB sent by each | computes | GPUs worth having at {FIXED} samples |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in made["paper"]:
        cells = [row["recipe"], f"`{row['shard']}`", row["link"], row["GPUs"], f"{row['GB']:.1f}", f"{row['computes']:.0%}"]
        lines.append("| " + " | ".join(map(str, [*cells, row["worth"] or ""])) + " |")
    return "\n".join(lines)


def draw(results: dict[str, Any]) -> None:
    """Share of the time that GPUs compute, over their number."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, len(MODELS), sharey=True)
    colours, lines = dict(zip(HOW, ("#0a6a6a", "#b04a14", "#5a49a3"), strict=True)), dict(zip(BETWEEN, ("-", ":"), strict=True))
    for axis, name in zip(panels, MODELS, strict=True):
        for how in HOW:
            for link in BETWEEN:
                curve = results["computed"]["curves"][f"{name}: {how}, {link}"]
                style = {"color": colours[how], "linestyle": lines[link], "marker": "o", "markersize": 3}
                axis.plot(list(map(int, curve)), [100 * y for y in curve.values()], label=f"shard {how}, {link}", **style)
        axis.set_title(f"{name}, a sample at a time on each GPU", fontsize=9)
        axis.set_xscale("log", base=2)
        axis.set_xticks(WORLDS, [str(n) for n in WORLDS])
        axis.set_xlabel("GPUs, 8 a machine with NVLink")
        axis.set_ylim(0, 104)
        axis.grid(alpha=0.3)
    panels[0].set_ylabel("time in which they compute, %")
    panels[0].legend(fontsize=7, loc="lower left")
    figure.suptitle("Assumed, not measured: 35 % of 989 TFLOP/s, the makers' bandwidths, nothing overlaps", fontsize=8)
    figure.savefig(PLOT, dpi=140)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compute", action="store_true", help="measure nothing")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work, args.out)
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if not args.compute:
        results["measured"] = measure()
    if not args.compute or "counted" not in results:
        results["counted"] = {name: counted(name) for name in MODELS}
    results |= {"assumed": ASSUMED, "computed": compute(results["measured"], results["counted"])}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    draw(results)
    if PAGE.is_file():
        before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n\n{table(results)}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
