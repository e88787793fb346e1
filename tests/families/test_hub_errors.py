"""What a hub refuses is told with what to do about it."""

import pytest
from diffusers import DiffusionPipeline

from stepdistill.errors import UserError
from stepdistill.families import load
from stepdistill.sources import pipeline_class


@pytest.mark.parametrize(
    ("said", "offline", "remedy"),
    [
        ("GatedRepoError: 401 Client Error", False, "accept the licence at https://huggingface.co/org/name"),
        ("cannot find model_index.json in the cached files", True, "unset HF_HUB_OFFLINE"),
        ("Connection error, and we cannot find the requested files", False, "folder of a copy"),
        ("404 Client Error: org/name is not a valid model identifier", False, "the hub has no such pipeline"),
    ],
)
def test_a_model_that_the_hub_does_not_give(monkeypatch, said, offline, remedy):
    def refuse(*_args, **_kwargs):
        raise OSError(said)

    monkeypatch.setattr(DiffusionPipeline, "download", refuse)
    monkeypatch.setattr(load, "HF_HUB_OFFLINE", offline)
    with pytest.raises(UserError, match="org/name") as caught:
        load.load_pipeline_folder("org/name")
    assert remedy in str(caught.value) and "\n" not in str(caught.value)


def test_the_class_of_a_known_model_is_known_before_it_is_loaded():
    assert pipeline_class("black-forest-labs/FLUX.1-dev") == "FluxPipeline"
    assert pipeline_class("somebody/something") is None
