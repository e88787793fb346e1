"""What each figure of the embedded world sees: drawings that are damaged step by step, and drawings as they are, few and many.

    python benchmarks/sensitivity.py

writes benchmarks/sensitivity.json and docs/sensitivity.png, in two minutes on one core.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageEnhance, ImageFilter

from stepdistill.evaluate.colour import COLOURS, colour
from stepdistill.evaluate.frechet import frechet_interval
from stepdistill.evaluate.meters import distances
from stepdistill.evaluate.provenance import checkout
from stepdistill.evaluate.readings import alignment
from stepdistill.evaluate.references import embedded
from stepdistill.evaluate.tiny import prompts, reference
from stepdistill.evaluate.variety import vendi
from stepdistill.tiny.judge import load_judge, look
from stepdistill.tiny.world import draw

REPO = Path(__file__).resolve().parent.parent
RESULTS, PLOT = REPO / "benchmarks/sensitivity.json", REPO / "docs/sensitivity.png"
SEED = 91  # of drawings that neither the reference nor the floor has
COUNTS, SETS = (256, 512, 1024, 2048, 4096), 5
DAMAGED = 2048


def each(change: Callable[[Image.Image], Image.Image]) -> Callable[[np.ndarray], np.ndarray]:
    """A change of one picture, made of all."""
    return lambda pictures: np.stack([np.asarray(change(Image.fromarray(picture))) for picture in pictures])


def noisy(pictures: np.ndarray, strength: float) -> np.ndarray:
    noise = np.random.default_rng(SEED).normal(0, strength, pictures.shape)
    return (pictures + noise).round().clip(0, 255).astype(np.uint8)


def fewer(pictures: np.ndarray, kept: int) -> np.ndarray:
    """The first pictures over and over: as good, and less varied."""
    return pictures[np.arange(len(pictures)) % kept]


DAMAGES = {  # what is done, and how strongly
    "blur, radius in pixels": (lambda x, s: each(lambda im: im.filter(ImageFilter.GaussianBlur(s)))(x), (0.4, 0.8, 1.2)),
    "noise, of 255": (noisy, (4, 8, 16)),
    "saturation, times": (lambda x, s: each(lambda im: ImageEnhance.Color(im).enhance(s))(x), (1.2, 1.5, 2.0)),
    "kept of 2,048 drawings": (fewer, (1024, 256, 64)),
}


def main() -> None:
    judge, against = load_judge(), embedded()
    scenes = prompts(DAMAGED)
    drawn = draw(scenes, SEED).images

    def row(pictures: np.ndarray) -> dict[str, float]:
        features, readings = look(judge, pictures)
        relative = colour(pictures).mean(0, dtype=np.float64) / reference().colour
        found = distances(features.astype(np.float32), against) | dict(zip(COLOURS, relative.tolist(), strict=True))
        return found | {"vendi": vendi(features[:512]), "alignment": alignment(scenes, readings).alignment}

    rows = [{"damage": "none", "strength": 0} | row(drawn)]
    for damage, (do, strengths) in DAMAGES.items():
        rows += [{"damage": damage, "strength": strength} | row(do(drawn, strength)) for strength in strengths]
        print(damage)
    floors = []
    for n in COUNTS:
        fds = [frechet_interval(look(judge, draw(prompts(n), SEED + 1 + k).images)[0], against.moments)[0] for k in range(SETS)]
        floors.append({"n": n, "fd": float(np.mean(fds)), "least": min(fds), "most": max(fds)})
        print("floor", floors[-1])
    made = {"rows": rows, "floors": floors, "commit": checkout()}
    made["machine"] = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    RESULTS.write_text(json.dumps(made, indent=1) + "\n")
    plot(rows).savefig(PLOT, dpi=100)


def plot(rows: list[dict]) -> Figure:
    """One panel a damage: how far every figure moves, relative to untouched drawings (FD and KID on a scale of their own)."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = figure.subplots(1, len(DAMAGES), sharey=True)
    names = ("precision", "recall", "density", "coverage", "alignment", "saturation", "contrast")
    whole = rows[0]
    for panel, damage in zip(panels, DAMAGES, strict=True):
        some = [row for row in rows if row["damage"] == damage]
        for name in names:
            values = [1.0, *(row[name] / whole[name] for row in some)]
            panel.plot(range(len(values)), values, label=name, lw=1.5, ls="--" if name in COLOURS else "-")
        labels = [f"{row['strength']:g}\nFD {row['fd']:.2f}" for row in some]
        panel.set_xticks(range(len(some) + 1), [f"none\nFD {whole['fd']:.2f}", *labels], fontsize=8)
        panel.set_title(damage, fontsize=10)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("relative to drawings")
    panels[0].set_ylim(0, 1.8)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(names), fontsize=9, frameon=False)
    return figure


if __name__ == "__main__":
    main()
