import json

import diffusers
import pytest
import torch
from PIL import Image
from students import PROMPTS, student

from stepdistill.errors import UserError
from stepdistill.export import write_export
from stepdistill.inference import Serving, find_export, load_pipeline, read_export, sample_run, serving


def exported(folder, teacher, strategy):
    """A distillation, and its run folder with the LoRA exported."""
    distillation = student(folder, teacher, strategy=strategy)
    write_export(distillation, folder / "run" / "export", ("diffusers",))
    return distillation, folder / "run"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("eps"), "eps", "{name: lcm}")


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("flow"), "flow", "{name: dmd2, renoise: true}")


def test_what_is_told(made):
    told = serving(made[0])
    assert (told.pipeline, told.strategy, told.steps, told.resolution) == ("StableDiffusionPipeline", "lcm", 4, 16)
    assert told.arguments == {"num_inference_steps": 4, "guidance_scale": 1.0}
    assert list(told.samplers) == [1, 2, 4, 8]
    assert told.lora["rank"] == told.lora["alpha"] == 4 and told.lora["scale"] == 1
    assert not told.reseed and not told.negative_prompt_supported
    assert told.prompts == tuple(PROMPTS)
    assert told.versions["diffusers"] == diffusers.__version__
    assert isinstance(told.build_scheduler(), diffusers.LCMScheduler)


def test_json_keeps_everything(made):
    told = read_export(made[1] / "export")
    assert told == Serving.from_json(told.to_json())
    assert told.files == {"diffusers": ("pytorch_lora_weights.safetensors",)}
    assert json.loads(told.to_json())["samplers"]["8"]["call"] == {"num_inference_steps": 8}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99}', '{"format": 1, "name": "x"}'])
def test_a_sidecar_that_is_none(text):
    with pytest.raises(UserError, match="export the run again"):
        Serving.from_json(text)


def test_only_steps_that_the_student_was_made_for(flow):
    told = serving(flow[0])
    assert list(told.samplers) == [1, 2, 4]  # DMD2's four steps and what divides them
    assert serving(flow[0], 2).steps == told.at(2).steps == 2
    with pytest.raises(UserError, match="3 steps; this student works in one of: 1, 2, 4"):
        told.at(3)


def test_a_flow_pipeline_keeps_its_generator_from_a_re_noising_scheduler(flow, tmp_path):
    assert serving(flow[0]).reseed
    assert not serving(student(tmp_path, "flow", strategy="{name: dmd2}")).reseed


def test_a_student_that_is_told_its_guidance(tmp_path):
    told = serving(student(tmp_path, "eps", "lora=null", strategy="{name: lcm, embed_guidance: 3.0}"))
    assert told.call == {"guidance_scale": 3.0} and told.lora is None
    assert all(sampler.comfyui is None and sampler.a1111 is None for sampler in told.samplers.values())


def test_another_resolution_is_an_argument(tmp_path):
    told = serving(student(tmp_path, "eps", "data.resolution=32"))
    assert told.arguments == {"num_inference_steps": 4, "guidance_scale": 1.0, "height": 32, "width": 32}


def test_what_cannot_be_exported_is_refused_before_training(tmp_path):
    with pytest.raises(UserError, match=r"stock pipeline cannot sample.*write 0.74975"):
        serving(student(tmp_path, strategy="{name: dmd2, steps: 2, times: [1.0, 0.75]}"))


def test_find_export(made, tmp_path):
    run = made[1]
    assert find_export(run) == find_export(run / "export") == run / "export"
    (tmp_path / "recipe.yaml").write_text("")
    with pytest.raises(UserError, match=r"no export yet.*stepdistill export"):
        find_export(tmp_path)
    with pytest.raises(UserError, match="neither a run folder nor an export"):
        find_export(tmp_path / "nowhere")


def test_load_pipeline(made):
    pipe = load_pipeline(made[1])
    assert type(pipe) is diffusers.StableDiffusionPipeline and len(pipe.get_active_adapters()) == 1
    pipe.scheduler.set_timesteps(4)
    assert pipe.scheduler.timesteps.tolist() == [999, 749, 499, 249]


def test_a_picture_is_a_function_of_prompt_steps_and_seed(made, flow, tmp_path):
    for _, run in (made, flow):
        files = [sample_run(run, PROMPTS[0], None, seed, tmp_path / f"{i}.png") for i, seed in enumerate((0, 0, 1))]
        a, again, b = map(pixels, files)
        assert torch.equal(a, again) and not torch.equal(a, b)
    assert not torch.equal(a, pixels(sample_run(flow[1], PROMPTS[0], 2, 0, tmp_path / "two.png")))


def test_sampling_leaves_the_random_state_alone(flow, tmp_path):
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    sample_run(flow[1], PROMPTS[0], 1, out=tmp_path / "x.png")
    assert torch.equal(torch.randn(3), expected)


def test_the_name_of_a_picture(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = sample_run(made[1] / "export", "A large, red circle!", 1, seed=7)
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
def test_samples_that_cannot_be(made, change, told, tmp_path):
    asked = {"prompt": "a star", "steps": 1, "seed": 0, "out": "x.png"} | change
    with pytest.raises(UserError, match=told):
        sample_run(made[1], **asked | {"out": tmp_path / asked["out"]})
    assert not list(tmp_path.iterdir())


def pixels(file):
    return torch.tensor(list(Image.open(file).convert("RGB").tobytes()))
