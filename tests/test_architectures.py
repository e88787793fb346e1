"""The shipped architectures: every network of a known model is built without weights, and has the parameters it is said to."""

import pytest
import torch

from stepdistill.architectures import DENOISERS, find, known
from stepdistill.meta import build_part, build_pipeline

PARTS = [(name, part) for name, a in known().items() for part in a.parts if a.parts[part].parameters]


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("name", "part"), [case for case in PARTS if case[1] in DENOISERS])
def test_denoisers_have_the_parameters_that_the_file_says_and_that_were_published(name, part):
    told = known()[name].parts[part]
    assert count(build_part(told)) == told.parameters
    assert told.published is None or abs(told.parameters / told.published - 1) < 0.01
    assert told.found and told.publication


@pytest.mark.long
@pytest.mark.parametrize(("name", "part"), [case for case in PARTS if case[1] not in DENOISERS])
def test_the_other_parts_have_the_parameters_that_the_file_says(name, part):
    told = known()[name].parts[part]
    assert count(build_part(told)) == told.parameters
    assert told.found


def test_models_are_found_by_any_of_their_ids():
    ids = [hub.lower() for a in known().values() for hub in a.hub]
    assert len(set(ids)) == len(ids) > 25
    assert find("StabilityAI/stable-diffusion-xl-base-1.0").name == "sdxl"
    assert find("runwayml/stable-diffusion-v1-5") is find("stable-diffusion-v1-5/stable-diffusion-v1-5")
    assert find("somebody/something") is None


def test_a_pipeline_is_built_of_its_parts_without_memory():
    pipe = build_pipeline(known()["sd15"], torch.bfloat16)
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    assert {p.device.type for p in pipe.unet.parameters()} == {"meta"}
    assert {p.dtype for module in (pipe.unet, pipe.vae, pipe.text_encoder) for p in module.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in pipe.unet.parameters())
    assert (pipe.tokenizer, pipe.safety_checker) == (None, None)
