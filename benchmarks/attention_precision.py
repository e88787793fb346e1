"""How far the kernel's derivative is from float64 in bfloat16, centred and not, as Triton's interpreter computes it on a CPU.

python benchmarks/attention_precision.py       # a minute; prints the table of docs/jvp.md

Weights and H are rounded to bfloat16 before each product, as on a GPU; the interpreter cuts digits off where a GPU rounds.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

import torch
from stepdistill_kernels import attention_jvp, launch
from torch import Tensor


def drawn(common: float, peak: float) -> list[Tensor]:
    """q, k, v and tangents [1, 2, 256, 64]; keys and query tangents share a direction, queries are so much larger."""
    random = torch.Generator().manual_seed(0)
    q, k, v, tq, tk, tv = (torch.randn(1, 2, 256, 64, generator=random) for _ in range(6))
    direction = common * torch.randn(64, generator=random)
    return [x.bfloat16() for x in (peak * q, k + direction, v, tq + direction, tk, tv)]


def error(tensors: list[Tensor], centred: bool) -> float:
    """Of the derivative, relative in the Euclidean norm."""
    want = attention_jvp(*(x.double() for x in tensors))[1]
    o, to = torch.empty_like(tensors[0]), torch.empty_like(tensors[0])
    launch.forward(*tensors, None, None, tensors[0].shape[3] ** -0.5, False, o, to, centred=centred)
    return float((to.double() - want).norm() / want.norm())


def main() -> None:
    print(f"torch {torch.__version__}, Triton's interpreter on the CPU\n")
    print("| in common | queries larger | centred | not centred |\n|---|---|---|---|")
    for common, peak in ((0, 1), (2, 1), (4, 1), (8, 1), (0, 4), (0, 16), (8, 4)):
        tensors = drawn(common, peak)
        print(f"| {common} times | {peak} times | {error(tensors, True):.1e} | {error(tensors, False):.1e} |")


if __name__ == "__main__":
    main()
