"""What a Jacobian-vector product costs: one exact pass of `jvp`, in forward passes of the same network without gradient.

    python benchmarks/jvp_cost.py              # into benchmarks/jvp_cost.json and docs/jvp.md
    python benchmarks/jvp_cost.py --repeats 30

Networks of diffusers with random weights, float32, PyTorch's own attention in the forward pass. Both passes take turns, so
that whatever else the machine does meets both.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from torch import Tensor

from stepdistill.attention import jvp

REPO = Path(__file__).resolve().parent.parent
RESULTS, PAGE = REPO / "benchmarks/jvp_cost.json", REPO / "docs/jvp.md"
BEGIN, END = "<!-- made by benchmarks/jvp_cost.py -->", "<!-- end of what was made -->"
Network = tuple[torch.nn.Module, Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]


def mmdit() -> Network:
    """As in Stable Diffusion 3: 256 tokens of a picture and 77 of text in joint attention."""
    net = diffusers.SD3Transformer2DModel(
        sample_size=32, num_layers=4, num_attention_heads=8, attention_head_dim=64, caption_projection_dim=512,
        joint_attention_dim=768, pooled_projection_dim=512, qk_norm="rms_norm",
    )  # fmt: skip
    text, pooled = torch.randn(1, 77, 768), torch.randn(1, 512)
    return net, lambda x, t: net(x, text, pooled, 1000 * t).sample, (1, 16, 32, 32)


def unet() -> Network:
    """As in Stable Diffusion XL: convolutions, self-attention over 1024 and 256 tokens, cross-attention to 77 of text."""
    net = diffusers.UNet2DConditionModel(
        sample_size=64, block_out_channels=(96, 192, 384), layers_per_block=1, cross_attention_dim=768,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(3, 3, 6),
        transformer_layers_per_block=(1, 1, 2), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=64, projection_class_embeddings_input_dim=6 * 64 + 256,
    )  # fmt: skip
    text, added = torch.randn(1, 77, 768), {"text_embeds": torch.randn(1, 256), "time_ids": torch.full((1, 6), 512.0)}
    return net, lambda x, t: net(x, 999 * t, text, added_cond_kwargs=added).sample, (1, 4, 64, 64)


NETWORKS = {"MMDiT": mmdit, "UNet": unet}


def clock(f: Callable[[], object]) -> float:
    begin = time.perf_counter()
    f()
    return time.perf_counter() - begin


def spread(times: list[float]) -> dict[str, float]:
    """Seconds: the median, and the first and last tenth."""
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return {"median": statistics.median(times), "p10": tenths[0], "p90": tenths[-1]}


@torch.no_grad()
def measure(build: Callable[[], Network], repeats: int) -> dict:
    """Times of both passes, in turns, and the median of the quotients of neighbours."""
    torch.manual_seed(0)
    net, f, shape = build()
    net.eval().requires_grad_(False)
    x, v, t, dt = torch.randn(shape), torch.randn(shape), torch.tensor([0.6]), torch.tensor([0.2])
    calls: Counter[str] = Counter()
    jvp(f, (x, t), (v, dt), calls=calls)  # warms up, as does the next
    f(x, t)
    times = [(clock(lambda: f(x, t)), clock(lambda: jvp(f, (x, t), (v, dt)))) for _ in range(repeats)]
    forward, both = zip(*times, strict=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=REPO, capture_output=True, text=True, check=True)
    return {
        "parameters": sum(p.numel() for p in net.parameters()),
        "attention": dict(calls),
        "forward": spread(list(forward)),
        "jvp": spread(list(both)),
        "quotient": spread([b / a for a, b in times]),
        "repeats": repeats,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads of {len(os.sched_getaffinity(0))} cores",
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
    }


def cell(figures: dict[str, float], unit: float, digits: int) -> str:
    median, p10, p90 = (f"{figures[key] * unit:.{digits}f}" for key in ("median", "p10", "p90"))
    return f"{median} ({p10} .. {p90})"


def table(results: dict[str, dict]) -> str:
    """The figures as Markdown."""
    lines = [["network", "parameters", "attention", "forward, ms", "JVP, ms", "JVP / forward"], ["---"] * 6]
    for name, made in results.items():
        attention = ", ".join(f"{n} x {given}" for given, n in made["attention"].items())
        times = [cell(made["forward"], 1e3, 0), cell(made["jvp"], 1e3, 0), cell(made["quotient"], 1, 2)]
        lines.append([name, f"{made['parameters'] / 1e6:.0f} million", attention, *times])
    first = next(iter(results.values()))
    notes = (
        f"Medians (and tenths) of {first['repeats']} passes of each, in turns. {first['machine']}, torch {first['torch']}, "
        f"commit {first['commit']}."
    )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{notes}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10, help="of each pass, 2 or more")
    repeats = parser.parse_args().repeats
    results = {}
    for name, build in NETWORKS.items():
        results[name] = measure(build, repeats)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(results)}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
