"""The embedded teachers as they ship: whole, small, and stock pipelines."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open

from stepdistill.evaluate.presets import tiny_suite
from stepdistill.evaluate.results import differences
from stepdistill.evaluate.shipped import shipped
from stepdistill.sources import embedded_models

TEACHERS = embedded_models()


def test_there_is_one():
    assert "stepdistill/tiny-sd" in TEACHERS


@pytest.mark.parametrize("name", TEACHERS)
def test_files_are_what_their_checksums_say_and_small(name):
    lines = (TEACHERS[name] / "SHA256SUMS").read_text().splitlines()
    sizes = 0
    for line in lines:
        digest, file = line.split("  ")
        content = (TEACHERS[name] / file).read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest, file
        sizes += len(content)
    assert sizes <= 12 * 2**20
    for file in TEACHERS[name].rglob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            assert {tensors.get_tensor(key).dtype for key in tensors.keys()} <= {torch.float16, torch.int64}  # noqa: SIM118


@pytest.mark.parametrize("name", TEACHERS)
def test_figures_are_of_these_weights(name):
    made = shipped(name)
    assert made is not None
    assert differences(made["provenance"], {"compared": tiny_suite(2048).compared}) == []  # so no run measures them anew
    rows = made["rows"]
    assert {(row["steps"], row["nfe"]) for row in rows} >= {(1, 1), (1, 2), (2, 2), (2, 4), (4, 4), (4, 8)}


def test_stock_diffusers_draws_with_them():
    """Alone, in a process that cannot see this package; a red caption gives a redder picture than a blue one."""
    code = (
        "import sys, numpy as np, torch\n"
        "from diffusers import DiffusionPipeline\n"
        "for teacher in sys.argv[1:]:\n"
        "    pipe = DiffusionPipeline.from_pretrained(teacher)\n"
        "    assert 'stepdistill' not in sys.modules\n"
        "    prompts = [f'a large {c} square on a plain background' for c in ('red', 'blue')]\n"
        "    red, blue = pipe(prompts, num_inference_steps=4, guidance_scale=3, output_type='np',\n"
        "                     generator=torch.Generator().manual_seed(0)).images\n"
        "    assert red.shape == (64, 64, 3)\n"
        "    print(float((red - blue)[..., 0].mean()), float((red - blue)[..., 2].mean()))\n"
    )
    command = [sys.executable, "-I", "-c", code, *map(str, TEACHERS.values())]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == len(TEACHERS)
    for name, line in zip(TEACHERS, lines, strict=True):
        more_red, more_blue = map(float, line.split())
        assert more_red > 0.01 and more_blue < -0.01, name


@pytest.mark.parametrize("name", TEACHERS)
def test_text_encoder_tells_captions_apart(name):
    pipe = DiffusionPipeline.from_pretrained(TEACHERS[name])
    ids = pipe.tokenizer(["a large red ring", "a small blue bar"], padding="max_length").input_ids
    assert np.shape(ids) == (2, 24)
    assert len(pipe.tokenizer("a large red ring").input_ids) == 6  # every word is one token
