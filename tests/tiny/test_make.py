"""The loop that fitted the embedded networks, and its optimizer."""

import pytest
import torch
from torch import nn

from stepdistill.tiny.make.fit import fit
from stepdistill.tiny.make.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(3, 8, 40), (2, 40, 8), (1, 16, 16)])
def test_orthogonal_brings_singular_values_to_one_and_keeps_directions(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    made = orthogonal(matrices)
    values = torch.linalg.svdvals(made)
    assert values.min() > 0.6 and values.max() < 1.3
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    apart = u.mT @ made @ vh.mT  # diagonal if the singular directions are kept
    torch.testing.assert_close(apart, torch.diag_embed(apart.diagonal(dim1=1, dim2=2)), atol=1e-4, rtol=0)


def test_muon_steps_as_far_for_a_convolution_as_for_its_matrix():
    """The step's size does not depend on the gradient's, and its root mean square is near 0.2 of the rate."""
    kernel = nn.Parameter(torch.zeros(16, 4, 3, 3))
    matrix = nn.Parameter(torch.zeros(16, 36))
    gradient = torch.randn(16, 36, generator=torch.Generator().manual_seed(1))
    kernel.grad, matrix.grad = gradient.reshape(kernel.shape), 1e4 * gradient
    Muon([kernel, matrix], lr=0.1).step()
    torch.testing.assert_close(kernel.detach().flatten(1), matrix.detach(), rtol=1e-4, atol=1e-6)
    assert 0.6 < matrix.square().mean().sqrt() / (0.2 * 0.1) < 1.3


@pytest.mark.parametrize("muon", [False, True])
def test_a_stopped_fit_goes_on_as_if_it_had_not_stopped(tmp_path, muon):
    def train(work, stop=None):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        work.mkdir(exist_ok=True)

        def loss(step):
            if step == stop:
                raise KeyboardInterrupt
            x = torch.randn(16, 4)
            return (net(x) - x[:, :2] * x[:, 2:]).square().mean()

        return fit("net", net, loss, 300, 1e-2, work, muon=muon)

    whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "broken", stop=250)
    again = train(tmp_path / "broken")
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
