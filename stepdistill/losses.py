"""Pure losses: tensors in, a scalar out; no networks, no schedules, no randomness."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .diffusion import Prediction, like


def surrogate(x: Tensor, grad: Tensor) -> Tensor:
    """A scalar whose gradient in x [B, ...] is exactly grad / x.numel(): 1/2 mean (x - sg(x - grad))^2."""
    return 0.5 * F.mse_loss(x, (x - grad).detach())


def distribution_matching(
    x: Tensor, real: Tensor, fake: Tensor, weight: Tensor | None = None, x0: Tensor | None = None
) -> Tensor:
    """Scalar whose gradient in x is the normalized score difference. DMD, arXiv:2311.18828, Eq. 7 and 8, in the form of
    its authors' code: (D_fake - D_real) over the sample's mean |x0 - D_real|.

    Args:
        x: the student's sample, with grad, [B, ...].
        real, fake: clean predictions of the guided teacher and of the fake score at the same x_t, [B, ...].
        weight: a factor for each sample [B] (the h of f-distill).
        x0: the clean sample that stands for x in the scale, where x is not clean itself.
    """
    with torch.no_grad():
        scale = 1 / ((x if x0 is None else x0) - real).abs().flatten(1).mean(1).clamp(min=1e-5)  # [B]
        scale = scale if weight is None else weight * scale
        grad = (fake - real) * like(scale, x)
    return surrogate(x, grad)


def pseudo_huber(a: Tensor, b: Tensor, c: float) -> Tensor:
    """Mean of sqrt((a - b)^2 + c^2) - c over all entries, as LCM's authors use it, arXiv:2310.04378; c > 0."""
    return (((a - b).square() + c**2).sqrt() - c).mean()


def huber_of_samples(a: Tensor, b: Tensor, c: float, weight: Tensor | None = None) -> Tensor:
    """Mean over samples of (sqrt(|a - b|^2 + (c d)^2) - c d) / d, for samples [B, ...] of d entries, as rf++ has it,
    arXiv:2405.20320; c > 0. weight: a factor for each sample [B]."""
    off = (a - b).flatten(1)
    c = c * off.shape[1]
    distance = ((off.square().sum(1) + c**2).sqrt() - c) / off.shape[1]
    return (distance if weight is None else weight.to(distance) * distance).mean()


def denoising(p: Prediction, target: Prediction, space: str, weight: Tensor | None = None) -> Tensor:
    """Mean squared error of a prediction against the clean sample and noise [B, ...] of its x_t.

    Args:
        space: what is compared: eps, x0, v or flow. All have the same minimizer and differ by a weight of t.
        weight: a factor for each sample [B].
    """
    error = (getattr(p, space) - getattr(target, space)).square()
    return (error if weight is None else like(weight, error) * error).mean()


def gan_student(fake_logits: Tensor) -> Tensor:
    """Non-saturating generator loss, arXiv:1406.2661: mean softplus(-logit of the student's samples)."""
    return F.softplus(-fake_logits).mean()


def gan_critic(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Discriminator loss, arXiv:1406.2661: mean softplus(-real) + mean softplus(fake)."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()
