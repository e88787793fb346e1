"""Opening an export as a stock pipeline: what it is, what it draws, and students that take turns in it."""

import diffusers
import pytest
import torch
from PIL import Image
from students import PROMPTS
from torch import nn

from stepdistill.errors import UserError
from stepdistill.serve import load_pipeline, sample_run, take_turns, tell


def test_load_pipeline(exported_eps):
    pipe = load_pipeline(exported_eps[1])
    assert type(pipe) is diffusers.StableDiffusionPipeline and len(pipe.get_active_adapters()) == 1
    pipe.scheduler.set_timesteps(4)
    assert pipe.scheduler.timesteps.tolist() == [999, 749, 499, 249]


class Net(nn.Module):
    def forward(self, sample, timestep, text=None):
        raise AssertionError("it was replaced")


def test_students_take_turns_as_the_time_falls():
    """Twice at a time (guidance) is one step; a time that rises is a new picture, even if the last one was broken off."""
    net, asked = Net(), []
    take_turns(net, [lambda *_args, k=k, **_named: asked.append(k) for k in (0, 0, 1)])
    for timesteps in ((999, 749, 249), (999, 749), (999, 999, 749, 749, 249, 249)):
        asked.clear()
        for timestep in timesteps:
            net(torch.zeros(1), torch.full((2,), timestep), text=None)
        assert asked == [{999: 0, 749: 0, 249: 1}[timestep] for timestep in timesteps]
    with pytest.raises(ValueError, match="loaded for 3 steps"):
        net(torch.zeros(1), 1)
    net(torch.zeros(1), timestep=999)
    assert asked[-1] == 0


@pytest.mark.parametrize("timestep", [999, torch.tensor(999), torch.full((2,), 999.0)])
def test_a_network_hears_the_time_that_it_is_told(timestep):
    """However its pipeline hands over the scheduler's; whole timesteps do not round it."""
    net, asked = Net(), []
    net.forward = lambda sample, timestep, text=None: asked.append((sample, timestep, text))
    tell(net, 249.75)
    net("x", timestep, text="a")
    net(timestep=timestep, sample="x")
    assert [(sample, text) for sample, _, text in asked] == [("x", "a"), ("x", None)]
    for _, heard, _ in asked:
        assert heard.shape == torch.as_tensor(timestep).shape and heard.unique().item() == 249.75


def test_a_picture_is_a_function_of_prompt_steps_and_seed(exported_eps, exported_flow, tmp_path):
    for _, run in (exported_eps, exported_flow):
        files = [sample_run(run, PROMPTS[0], None, seed, tmp_path / f"{i}.png") for i, seed in enumerate((0, 0, 1))]
        a, again, b = map(pixels, files)
        assert torch.equal(a, again) and not torch.equal(a, b)
    assert not torch.equal(a, pixels(sample_run(exported_flow[1], PROMPTS[0], 2, 0, tmp_path / "two.png")))


def test_sampling_leaves_the_random_state_alone(exported_flow, tmp_path):
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    sample_run(exported_flow[1], PROMPTS[0], 1, out=tmp_path / "x.png")
    assert torch.equal(torch.randn(3), expected)


def test_the_name_of_a_picture(exported_eps, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = sample_run(exported_eps[1] / "export", "A large, red circle!", 1, seed=7)
    assert str(out) == "a-large-red-circle_1steps_seed7.png" and out.is_file()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"prompt": "  "}, "--prompt is empty"),
        ({"steps": 3}, "works in one of: 1, 2, 4, 8"),
        ({"seed": 2**64}, "64-bit"),
        ({"out": "x.jpg"}, "must end in .png"),
        ({"out": "nowhere/x.png"}, "no folder.*mkdir"),
    ],
)
def test_samples_that_cannot_be(exported_eps, change, told, tmp_path):
    asked = {"prompt": "a star", "steps": 1, "seed": 0, "out": "x.png"} | change
    with pytest.raises(UserError, match=told):
        sample_run(exported_eps[1], **asked | {"out": tmp_path / asked["out"]})
    assert not list(tmp_path.iterdir())


def pixels(file):
    return torch.tensor(list(Image.open(file).convert("RGB").tobytes()))
