"""Schedules against what stock diffusers schedulers do."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler
from worlds import F64, FLOW, SD_SCHEDULER, SHIFTED, VP

EVERY = pytest.mark.parametrize("schedule", [VP, FLOW, SHIFTED], ids=["vp", "flow", "shifted"])


@EVERY
def test_time_inverts_the_angle(schedule):
    t = torch.cat([torch.linspace(0, 1, 1001, dtype=F64), torch.tensor([0.123456, 1 / 3, 0.9876], dtype=F64)])
    a, s = schedule.alpha_sigma(t)
    assert torch.allclose(schedule.time(torch.atan2(s, a)), t, rtol=0, atol=1e-10)


@EVERY
def test_noise_grows_with_time(schedule):
    a, s = schedule.alpha_sigma(torch.linspace(0, 1, 2001, dtype=F64))
    assert (torch.atan2(s, a).diff() > 0).all()


@EVERY
def test_alpha_sigma_differentiates_in_time(schedule):
    t = torch.tensor([0.1234, 0.5678, 0.91011], dtype=F64, requires_grad=True)
    torch.autograd.gradcheck(schedule.alpha_sigma, t)


@EVERY
def test_warp_is_monotone_between_the_ends(schedule):
    t = schedule.warp(torch.linspace(0, 1, 101, dtype=F64))
    assert t[0] == 0 and t[-1] == 1 and (t.diff() > 0).all()


@EVERY
def test_unwarp_inverts_warp(schedule):
    for u in (0.0, 0.001, 0.3, 0.77, 1.0):
        assert schedule.unwarp(schedule.warp(u)) == pytest.approx(u, abs=1e-12)


@EVERY
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 50])
def test_grid_rises_from_zero_to_one(schedule, n):
    grid = schedule.grid(n)
    assert len(grid) == n + 1 and grid[0] == 0 and grid[-1] == 1 and list(grid) == sorted(set(grid))


def test_vp_is_the_ddpm_table_at_whole_timesteps():
    table = DDIMScheduler(**SD_SCHEDULER).alphas_cumprod.double()
    a, s = VP.alpha_sigma(torch.arange(1000, dtype=F64) / 999)
    assert torch.allclose(a**2, table, rtol=1e-9) and torch.allclose(a**2 + s**2, torch.ones(1000, dtype=F64))


def test_vp_in_float32_is_vp_in_float64():
    t = torch.rand(1000, dtype=F64, generator=torch.Generator().manual_seed(0)).float()
    for low, high in zip(VP.alpha_sigma(t), VP.alpha_sigma(t.double()), strict=True):
        assert low.dtype == torch.float32 and torch.allclose(low.double(), high, rtol=0, atol=1e-7)


def test_errors_in_eps_grow_14_6_times_at_the_end_of_sd():
    a, s = VP.alpha_sigma(torch.ones(1, dtype=F64))
    assert (s / a).item() == pytest.approx(14.61, abs=0.01)  # trap 8


def timesteps(grid):
    """A grid as the diffusers timesteps that a sampler visits; exactly whole numbers."""
    at = [t * 999 for t in grid[:0:-1]]
    assert all(math.isclose(k, round(k), abs_tol=1e-9) for k in at)
    return [round(k) for k in at]


def test_vp_grid_is_the_trailing_grid_of_dmd2():
    assert timesteps(VP.grid(4)) == [999, 749, 499, 249]


@pytest.mark.parametrize("n", [1, 2, 4, 5, 8, 10, 25, 50])
def test_vp_grid_is_diffusers_trailing_spacing(n):
    stock = DDIMScheduler(**SD_SCHEDULER, timestep_spacing="trailing")
    stock.set_timesteps(n)
    assert timesteps(VP.grid(n)) == stock.timesteps.tolist()


def test_vp_grid_of_50_is_the_one_of_lcm():
    assert timesteps(VP.grid(50))[::-1] == list(range(19, 1000, 20))
    stock = LCMScheduler(**SD_SCHEDULER)
    stock.set_timesteps(50, original_inference_steps=50)
    assert timesteps(VP.grid(50)) == stock.timesteps.tolist()


@pytest.mark.parametrize("eta", [0.0, 0.16, 0.3, 0.35, 0.9, 1.0])
def test_scaled_times_are_the_whole_timesteps_of_tcd(eta):
    k = torch.arange(1000)
    rounded = torch.floor((1 - eta) * k).long()  # as TCDScheduler.step says it
    assert [round(VP.scaled(j / 999, 1 - eta) * 999) for j in k.tolist()] == rounded.tolist()
    assert VP.scaled(499 / 999, 1.0) == 499 / 999 and SHIFTED.scaled(0.8, 1 - eta) == pytest.approx(0.8 * (1 - eta))


@pytest.mark.parametrize("schedule", [FLOW, SHIFTED])
@pytest.mark.parametrize("n", [1, 4, 7])
def test_flow_grid_is_flow_match_euler(schedule, n):
    stock = FlowMatchEulerDiscreteScheduler(shift=schedule.shift)
    stock.set_timesteps(sigmas=np.linspace(1, 1 / n, n))
    assert torch.allclose(stock.sigmas, torch.tensor(schedule.grid(n)[::-1]), rtol=0, atol=1e-6)


def test_flow_warp_is_the_shift_of_flow_match_euler():
    stock = FlowMatchEulerDiscreteScheduler(shift=3.0)
    u = torch.arange(1000, 0, -1, dtype=F64) / 1000
    assert torch.allclose(stock.sigmas, SHIFTED.warp(u).float(), rtol=0, atol=1e-6)
    assert SHIFTED.grid(4) == pytest.approx((0, 0.5, 0.75, 0.9, 1))
