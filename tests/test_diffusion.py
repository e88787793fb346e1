"""The algebra of x_t = alpha x0 + sigma eps, in float64 against closed forms."""

import pytest
import torch
from worlds import F64, FLOW, VP, Gaussian, Mixture, spread

from stepdistill.diffusion import Prediction, anchored, guide, halves, like, mix, read, transition

T = torch.tensor([0.05, 0.3, 0.62, 0.97], dtype=F64)
EDM = torch.ones(4, dtype=F64), 6 * T
EVERY = pytest.mark.parametrize("coefficients", [VP.alpha_sigma(T), FLOW.alpha_sigma(T), EDM], ids=["vp", "flow", "edm"])
GENERATOR = torch.Generator().manual_seed(0)
X0, EPS = torch.randn(2, 4, 3, 5, dtype=F64, generator=GENERATOR)


def outputs(x0, eps, a, s):
    """What a network of each kind would answer."""
    a, s = a.reshape(-1, 1, 1), s.reshape(-1, 1, 1)
    return {"eps": eps, "x0": x0, "v": a * eps - s * x0, "flow": eps - x0}


@EVERY
@pytest.mark.parametrize("kind", ["eps", "x0", "v", "flow"])
def test_read_recovers_sample_and_noise(coefficients, kind):
    a, s = coefficients
    p = read(kind, outputs(X0, EPS, a, s)[kind], mix(X0, EPS, a, s), a, s)
    assert torch.allclose(p.x0, X0, rtol=0, atol=1e-12) and torch.allclose(p.eps, EPS, rtol=0, atol=1e-12)
    for name, want in outputs(X0, EPS, a, s).items():
        assert torch.allclose(getattr(p, name), want, rtol=0, atol=1e-11)


@EVERY
@pytest.mark.parametrize("kind", ["eps", "x0", "v", "flow"])
def test_any_raw_output_solves_the_mixture(coefficients, kind):
    a, s = coefficients
    p = read(kind, raw := X0.flip(0) + 2, x_t := EPS.flip(1), a, s)
    assert torch.allclose(mix(p.x0, p.eps, a, s), x_t, rtol=0, atol=1e-11)
    assert torch.allclose(getattr(p, kind), raw, rtol=0, atol=1e-11)


@EVERY
@pytest.mark.parametrize("net", [Gaussian(0.7, 0.5), Mixture()], ids=["gaussian", "mixture"])
def test_score_is_the_gradient_of_the_log_density(coefficients, net):
    x_t, (a, s) = EPS.clone().requires_grad_(), (like(c, EPS) for c in coefficients)
    x0, eps = net(x_t, a, s, {})
    (want,) = torch.autograd.grad(net.log_density(x_t, a, s).sum(), x_t)
    assert torch.allclose(Prediction(x0, eps, a, s).score, want, rtol=1e-10)
    assert torch.allclose(a * x0 + s * eps, x_t, rtol=0, atol=1e-12)  # the worlds themselves are consistent


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="'mean' is not one of eps, x0, v, flow"):
        read("mean", X0, EPS, *FLOW.alpha_sigma(T))


@EVERY
@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0, torch.tensor([0.0, 1.0, 2.5, 8.0], dtype=F64)])
def test_guidance_of_equal_variances_shifts_the_mean(coefficients, scale):
    a, s = (like(c, EPS) for c in coefficients)

    def believe(mean):
        return Prediction(*Gaussian(mean, 0.5)(EPS, a, s, {}), a, s)

    w = scale.reshape(-1, 1, 1) if isinstance(scale, torch.Tensor) else scale
    got, want = guide(believe(1.0), believe(-0.5), scale), believe(-0.5 + w * 1.5)
    for name in ("x0", "eps", "v", "flow", "score"):
        assert torch.allclose(getattr(got, name), getattr(want, name), rtol=0, atol=1e-11)


@pytest.mark.parametrize("schedule", [VP, FLOW])
def test_transition_composes(schedule):
    """q(x_t) = the integral of q(x_t | x_s) q(x_s), in mean and variance, for any x0 of spread c."""
    since, to = schedule.alpha_sigma(T - 0.04), schedule.alpha_sigma(T)
    ratio, noise = transition(since, to)
    assert torch.allclose(ratio * since[0], to[0], rtol=0, atol=1e-12)
    assert torch.allclose(spread(ratio, noise, spread(*since, 0.5)), spread(*to, 0.5), rtol=0, atol=1e-12)


def test_transition_of_rectified_flow():
    s = T - 0.04
    _, noise = transition(FLOW.alpha_sigma(s), FLOW.alpha_sigma(T))
    assert torch.allclose(noise**2, (T - s) * (T + s - 2 * T * s) / (1 - s) ** 2, rtol=1e-10)
    assert (transition(FLOW.alpha_sigma(T), FLOW.alpha_sigma(T))[1] == 0).all()


@pytest.mark.parametrize("schedule", [VP, FLOW])
def test_anchored_target_has_the_marginal_as_its_expectation(schedule):
    """Over x_s given x_t, by quadrature, for a mixture at the anchors and any parameterization."""
    since, to = (schedule.alpha_sigma(torch.tensor([t], dtype=F64)) for t in (0.4, 0.7))
    ratio, step = transition(since, to)
    x_s = torch.linspace(-8, 8, 20001, dtype=F64)[:, None]
    anchors = Mixture().log_density(x_s, *since).exp()
    for x_t in (-1.2, 0.1, 0.9):
        eps = (x_t - ratio * x_s) / step
        weight = anchors * (-eps.square() / 2).exp()
        target, (a, s) = anchored(x_s, eps, since, to), (c[:, None] for c in to)
        want = Prediction(*Mixture()(torch.tensor([[x_t]], dtype=F64), a, s, {}), a, s)
        for name in ("x0", "eps", "v", "flow"):
            mean = (weight * getattr(target, name)).sum() / weight.sum()
            assert mean.item() == pytest.approx(getattr(want, name).item(), abs=1e-9)


@pytest.mark.parametrize("schedule", [VP, FLOW])
def test_anchored_at_clean_samples_is_plain(schedule):
    """Bit for bit."""
    target = anchored(X0, EPS, (torch.ones_like(T), torch.zeros_like(T)), schedule.alpha_sigma(T))
    assert torch.equal(target.x0, X0) and torch.equal(target.eps, EPS)


def test_anchored_flow_target_on_rectified_flow_is_the_paper_s():
    """[(t - 2 s t + s^2) / ((1 - s)^2 sigma)] eps - x_s / (1 - s)."""
    s, t = T - 0.04, T
    sigma = transition(FLOW.alpha_sigma(s), FLOW.alpha_sigma(t))[1]
    want = like((t - 2 * s * t + s**2) / ((1 - s) ** 2 * sigma), EPS) * EPS - like(1 / (1 - s), X0) * X0
    assert torch.allclose(anchored(X0, EPS, FLOW.alpha_sigma(s), FLOW.alpha_sigma(t)).flow, want, rtol=1e-9)


def test_coefficients_take_the_dtype_of_the_sample():
    assert mix(X0.float(), EPS.float(), *VP.alpha_sigma(T)).dtype == torch.float32
    assert like(T, X0).shape == (4, 1, 1)


def test_halves_undo_cat():
    a, s = FLOW.alpha_sigma(T)
    p, q = read("flow", X0, EPS, a, s), read("flow", EPS, X0, a, s)
    twice = [torch.cat(x) for x in ((X0, EPS), (EPS, X0), (a, a), (s, s))]
    for got, want in zip(halves(read("flow", *twice)), (p, q), strict=True):
        assert torch.equal(got.x0, want.x0) and torch.equal(got.eps, want.eps) and torch.equal(got.alpha, want.alpha)
