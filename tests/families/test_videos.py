"""What LTX-Video, CogVideoX and HunyuanVideo have of their own; the rest is in test_conformance.py."""

import pipelines
import pytest
import torch
from pipelines import PROMPTS

from stepdistill.errors import UserError
from stepdistill.families import LTX, CogVideoX, HunyuanVideo
from stepdistill.families.load import check_size
from stepdistill.samplers import find_sampler
from stepdistill.sampling import Inference, trailing


@pytest.fixture(scope="module")
def cog():
    return CogVideoX(pipelines.cogvideox(), frames=5)


@pytest.mark.parametrize("n", [1, 2, 4, 8])
@pytest.mark.parametrize(("renoise", "kind"), [(True, "LCMScheduler"), (False, "DDIMScheduler")])
def test_cogvideox_s_own_table_is_written_out_for_stock_schedulers(cog, n, renoise, kind):
    config, how = cog.pipe.scheduler.config, Inference(trailing(cog.schedule.grid(n)), renoise)
    sampler = find_sampler(cog.schedule, cog.kind, config, how, takes=cog.takes)
    assert (sampler.scheduler, sampler.call) == (kind, {"num_inference_steps": n})
    table = sampler.build().alphas_cumprod
    assert torch.allclose(table, cog.pipe.scheduler.alphas_cumprod.float(), rtol=1e-4, atol=1e-7)
    assert table[-1] == 0 and sampler.comfyui is None


def test_version_1_5_pads_its_first_latents():
    family = CogVideoX(pipelines.cogvideox(rope=True, patch_size_t=2), (32, 32), 9)
    latents = family.encode(torch.rand(1, 3, 9, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert latents.shape[1:] == family.shape == (4, 4, 4, 4) and family.spare == 1
    assert torch.equal(latents[:, 0], latents[:, 1]) and family.decode(latents).shape == (1, 3, 9, 32, 32)
    assert (family.fps, CogVideoX.frames, family.native) == (16.0, 49, (64, 64))


def test_ltx_s_shift_is_of_all_frames():
    """As its pipeline counts them: mu is affine in the latents of the whole video."""
    few, many = (LTX(pipelines.ltx(), (32, 32), frames) for frames in (1, 33))
    assert (few.tokens, many.tokens) == (64, 9 * 64)
    assert many.schedule.shift == pytest.approx(torch.tensor(0.5 + 0.65 * (576 - 256) / (4096 - 256)).exp().item())
    assert few.schedule.shift < many.schedule.shift


@pytest.mark.parametrize(("make", "kind", "frames"), [("ltx", LTX, 10), ("hunyuanvideo", HunyuanVideo, 128)])
def test_frames_are_checked(make, kind, frames):
    with pytest.raises(UserError, match=rf"data.frames {frames}: a {kind.pipeline} makes 1 frame"):
        check_size(kind(getattr(pipelines, make)(), (32, 32), frames))


def test_hunyuanvideo_hears_its_guidance():
    family = HunyuanVideo(pipelines.hunyuanvideo(), (16, 16), 5)
    x, t, cond = torch.zeros(3, *family.shape), torch.full([3], 0.5), family.encode_prompts(PROMPTS)
    assert cond["mask"].sum(1).unique().numel() == 3  # prompts of three lengths
    plain, same, more = (
        family.forward(family.net, x, t, cond | told)
        for told in ({}, {"guidance": torch.full([3], 6.0)}, {"guidance": torch.full([3], 1.0)})
    )
    assert torch.equal(plain, same) and not torch.allclose(plain, more, atol=1e-4)
    assert family.null_prompts() is None


def test_an_autoencoder_that_hears_noise_is_told_that_none_is_left():
    family, heard = LTX(pipelines.ltx(), (32, 32), 9), []
    family.pipe.vae.register_to_config(timestep_conditioning=True)
    family.pipe.vae.decode = lambda z, temb, return_dict: heard.append(temb) or (z,)
    family.decode(torch.ones(2, *family.shape))
    assert torch.equal(heard[0], torch.zeros(2))
