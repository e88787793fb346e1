import json

import diffusers
import pytest
from students import PROMPTS, student

from stepdistill.errors import UserError
from stepdistill.inference import serving
from stepdistill.sampling import Hop, Inference
from stepdistill.sidecar import Serving, find_export, read_export
from stepdistill.strategies import BOOT


def test_what_is_told(exported_eps):
    told = serving(exported_eps[0])
    assert (told.pipeline, told.strategy, told.steps, told.size) == ("StableDiffusionPipeline", "lcm", 4, (16, 16))
    assert told.arguments == {"num_inference_steps": 4, "guidance_scale": 1.0}
    assert list(told.samplers) == [1, 2, 4, 8]
    assert told.lora["rank"] == told.lora["alpha"] == 4 and told.lora["scale"] == 1
    assert not told.reseed and not told.negative_prompt_supported
    assert told.prompts == tuple(PROMPTS)
    assert told.versions["diffusers"] == diffusers.__version__
    assert isinstance(told.build_scheduler(), diffusers.LCMScheduler)


def test_json_keeps_everything(exported_eps):
    told = read_export(exported_eps[1] / "export")
    assert told == Serving.from_json(told.to_json())
    assert told.files == {"diffusers": ("pytorch_lora_weights.safetensors",)}
    assert json.loads(told.to_json())["samplers"]["8"]["call"] == {"num_inference_steps": 8}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99}', '{"format": 1, "name": "x"}'])
def test_a_sidecar_that_is_none(text):
    with pytest.raises(UserError, match="export the run again"):
        Serving.from_json(text)


def test_only_steps_that_the_student_was_made_for(exported_flow):
    told = serving(exported_flow[0])
    assert list(told.samplers) == [1, 2, 4]  # DMD2's four steps and what divides them
    assert serving(exported_flow[0], 2).steps == told.at(2).steps == 2
    with pytest.raises(UserError, match="3 steps; this student works in one of: 1, 2, 4"):
        told.at(3)


def test_a_flow_pipeline_keeps_its_generator_from_a_re_noising_scheduler(exported_flow, tmp_path):
    assert serving(exported_flow[0]).reseed
    assert not serving(student(tmp_path, "flow", strategy="{name: dmd2}")).reseed


def test_eta_is_an_argument(tmp_path):
    told = serving(student(tmp_path, strategy="{name: tscd, segments: [1], mix: [0.0], eta: 0.3}"))
    assert told.arguments == {"num_inference_steps": 4, "eta": 0.3, "guidance_scale": 1.0}
    assert list(told.samplers) == [1, 2, 4, 8] and told.at(2).arguments["eta"] == 0.3
    own = serving(student(tmp_path, strategy="{name: tscd, segments: [4], mix: [0.0]}"))
    assert list(own.samplers) == [4] and own.sampler.scheduler == "DDIMScheduler" and "eta" not in own.arguments


@pytest.mark.parametrize(("eta", "reseed"), [("0.0", False), ("1.0", True)])
def test_eta_on_flow(tmp_path, eta, reseed):
    strategy = f"{{name: tscd, segments: [1], mix: [0.0], eta: {eta}}}"
    assert serving(student(tmp_path, "flow", strategy=strategy)).reseed == reseed


def test_eta_that_flow_has_not_is_refused_before_training(tmp_path):
    with pytest.raises(UserError, match=r"stock pipeline cannot sample.*set it to 0 or 1"):
        serving(student(tmp_path, "flow", strategy="{name: tscd, segments: [1], mix: [0.0], eta: 0.3}"))


def test_a_student_that_is_told_its_guidance(tmp_path):
    told = serving(student(tmp_path, "eps", "lora=null", strategy="{name: lcm, embed_guidance: 3.0}"))
    assert told.call == {"guidance_scale": 3.0} and told.lora is None
    assert all(sampler.comfyui is None and sampler.a1111 is None for sampler in told.samplers.values())


@pytest.mark.parametrize(("teacher", "unit"), [("eps", 999), ("sdxl", 999), ("flow", 1000), ("flux", 1)])
def test_a_student_that_is_told_another_time(tmp_path, teacher, unit, monkeypatch):
    """In the units of its network, as its pipeline tells it times; and only in its own number of steps."""
    how = {"hops": (Hop(1.0),), "renoise": False, "told": 0.25}
    monkeypatch.setattr(BOOT, "inference", lambda _self, _schedule, _steps=None: Inference(**how))
    told = serving(student(tmp_path, teacher, "data.resolution=16", strategy="{name: boot, guidance: 1}"))
    assert told.sampler.told == 0.25 * unit and told.sampler.comfyui is None and told.sampler.a1111 is None
    assert Serving.from_json(told.to_json()) == told


def test_a_sidecar_from_before_students_were_told_times(exported_eps):
    told = read_export(exported_eps[1] / "export")
    tree = json.loads(told.to_json())
    for sampler in tree["samplers"].values():
        del sampler["told"]
    assert Serving.from_json(json.dumps(tree)) == told


def test_another_resolution_is_an_argument(tmp_path):
    told = serving(student(tmp_path, "eps", "data.resolution=32"))
    assert told.arguments == {"num_inference_steps": 4, "guidance_scale": 1.0, "height": 32, "width": 32}


def test_what_cannot_be_exported_is_refused_before_training(tmp_path):
    with pytest.raises(UserError, match=r"stock pipeline cannot sample.*write 0.74975"):
        serving(student(tmp_path, strategy="{name: dmd2, steps: 2, times: [1.0, 0.75]}"))


def test_find_export(exported_eps, tmp_path):
    run = exported_eps[1]
    assert find_export(run) == find_export(run / "export") == run / "export"
    (tmp_path / "recipe.yaml").write_text("")
    with pytest.raises(UserError, match=r"no export yet.*stepdistill export"):
        find_export(tmp_path)
    with pytest.raises(UserError, match="neither a run folder nor an export"):
        find_export(tmp_path / "nowhere")
