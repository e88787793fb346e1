"""Muon: momentum whose every matrix is made nearly orthogonal before the step.

Source: K. Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024); the step's size as in
arXiv:2502.16982, eq. 4, so that AdamW's rate fits. `torch.optim.Muon` refuses convolutions and works in bfloat16, which
few CPUs can.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor
from torch.optim import Optimizer

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class Muon(Optimizer):
    """Args: params, matrices and convolutions ([out, in, height, width], taken as [out, in * height * width])."""

    def __init__(self, params, lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            alike = defaultdict(list)  # parameters of one matrix shape share their products
            for p in group["params"]:
                if p.grad is not None:
                    alike[p.flatten(1).shape].append(p)
            for (rows, columns), params in alike.items():
                for p in params:
                    self.state[p].setdefault("momentum", torch.zeros_like(p)).lerp_(p.grad, 1 - group["momentum"])
                ahead = [p.grad.lerp(self.state[p]["momentum"], group["momentum"]).flatten(1) for p in params]
                size = 0.2 * group["lr"] * max(rows, columns) ** 0.5
                for p, update in zip(params, orthogonal(torch.stack(ahead)), strict=True):
                    p.sub_(update.reshape(p.shape), alpha=size)


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """The matrices [N, rows, columns] with all singular values brought to about 1 (0.7 to 1.2)."""
    x = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-12)
    a, b, c = NEWTON_SCHULZ
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if matrices.shape[1] <= matrices.shape[2] else x.mT
