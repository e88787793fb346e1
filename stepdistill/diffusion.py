"""Pure algebra of x_t = alpha x0 + sigma eps. Coefficients have shape [B] and are broadcast over samples [B, ...]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Kind = Literal["eps", "x0", "v", "flow"]


def like(c: Tensor, x: Tensor) -> Tensor:
    """Coefficients c [B] as [B, 1, ...] in x's dtype, so that they multiply x [B, ...]."""
    return c.to(x).reshape(-1, *[1] * (x.ndim - 1))


def mix(x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x_t [B, ...] from x0, eps [B, ...] and coefficients [B]."""
    return like(alpha, x0) * x0 + like(sigma, x0) * eps


@dataclass(frozen=True)
class Prediction:
    """What a denoiser believes about one x_t: the clean sample, and the noise it was mixed with."""

    x0: Tensor  # [B, ...], at least float32, like eps
    eps: Tensor  # [B, ...]
    alpha: Tensor  # [B, 1, ...]
    sigma: Tensor  # [B, 1, ...]

    @property
    def score(self) -> Tensor:
        return -self.eps / self.sigma

    @property
    def flow(self) -> Tensor:
        return self.eps - self.x0

    @property
    def v(self) -> Tensor:
        return self.alpha * self.eps - self.sigma * self.x0

    @property
    def trig(self) -> Tensor:
        """dx/dtheta of TrigFlow's x = x_t / |(alpha, sigma)| at the angle theta = atan2(sigma, alpha), arXiv:2410.11081."""
        return self.v / (self.alpha**2 + self.sigma**2).sqrt()


def read(kind: Kind, raw: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Prediction:
    """Solve x_t = alpha x0 + sigma eps together with the one equation that the network's raw output adds.

    Args:
        raw, x_t: [B, ...]; alpha, sigma: [B]. eps needs alpha > 0, x0 needs sigma > 0; v and flow need neither.

    Raises:
        ValueError: kind is not one of eps, x0, v, flow.
    """
    a, s = like(alpha, x_t), like(sigma, x_t)
    if kind == "eps":
        x0, eps = (x_t - s * raw) / a, raw
    elif kind == "x0":
        x0, eps = raw, (x_t - a * raw) / s
    elif kind == "v":  # v = alpha eps - sigma x0, arXiv:2202.00512
        norm = a**2 + s**2
        x0, eps = (a * x_t - s * raw) / norm, (s * x_t + a * raw) / norm
    elif kind == "flow":  # u = eps - x0
        x0, eps = (x_t - s * raw) / (a + s), (x_t + a * raw) / (a + s)
    else:
        raise ValueError(f"prediction kind {kind!r} is not one of eps, x0, v, flow")
    return Prediction(x0, eps, a, s)


def guide(cond: Prediction, null: Prediction, scale: float | Tensor) -> Prediction:
    """Classifier-free guidance, arXiv:2207.12598; scale (a number or [B]) 1 is unguided.

    Each parameterization is affine in the others at fixed x_t, so guiding x0 and eps guides them all.
    """
    w = like(scale, cond.x0) if isinstance(scale, Tensor) else scale
    return Prediction(null.x0 + w * (cond.x0 - null.x0), null.eps + w * (cond.eps - null.eps), cond.alpha, cond.sigma)


def transition(since: tuple[Tensor, Tensor], to: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Coefficients [B] of q(x_t | x_s) from (alpha, sigma) at s and at t > s: alpha_t / alpha_s and
    sqrt(sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2)."""
    (a_s, s_s), (a_t, s_t) = since, to
    ratio = a_t / a_s
    return ratio, (s_t**2 - ratio**2 * s_s**2).clamp(min=0).sqrt()


def anchored(x_s: Tensor, eps: Tensor, since: tuple[Tensor, Tensor], to: tuple[Tensor, Tensor]) -> Prediction:
    """What denoising score matching must aim at where x_t was made from x_s and eps [B, ...] by `transition(since, to)`.

    The expectation of each part given x_t is that of the marginal of x_t, whatever the distribution of x_s. Phased DMD,
    arXiv:2510.27684, Eq. 11 and 12; from clean samples (alpha 1, sigma 0) it is (x_s, eps) itself.
    """
    (a_s, s_s), (a_t, s_t) = since, to
    step = transition(since, to)[1]
    x0 = mix(x_s, eps, 1 / a_s, -a_t * s_s**2 / (a_s**2 * step))
    return Prediction(x0, like(s_t / step, eps) * eps, like(a_t, x_s), like(s_t, x_s))


def halves(p: Prediction) -> tuple[Prediction, Prediction]:
    """The two halves of a batch that was made of two."""
    first, second = zip(*(x.chunk(2) for x in (p.x0, p.eps, p.alpha, p.sigma)), strict=True)
    return Prediction(*first), Prediction(*second)
