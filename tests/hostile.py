"""Files that would do harm: pickles that leave a mark when they run, folders with code, safetensors with false headers."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import torch

from stepdistill.samplers import Sampler
from stepdistill.sidecar import Serving
from stepdistill.sources import embedded_models

TEACHER = embedded_models()["stepdistill/tiny-sd"]


class Opens:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path):
        self.mark = str(mark)

    def __reduce__(self):
        return open, (self.mark, "w")


def pickle(path: Path, mark: Path) -> Path:
    """A file of weights as torch.save writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"weight": torch.zeros(2), "state_dict": Opens(mark)}, path)
    return path


def code(path: Path, mark: Path) -> Path:
    """A module that makes a file when it is imported."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"open({str(mark)!r}, 'w')\n"
        "from diffusers import StableDiffusionPipeline, UNet2DConditionModel\n"
        "class Pipeline(StableDiffusionPipeline): pass\n"
        "class Net(UNet2DConditionModel): pass\n"
    )
    return path


def model(folder: Path, **index: object) -> Path:
    """The embedded teacher in a folder, its weights as links; `index` changes its model_index.json."""
    for file in (file for file in TEACHER.rglob("*") if file.is_file()):
        place = folder / file.relative_to(TEACHER)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.symlink(file, place) if file.suffix == ".safetensors" else place.write_bytes(file.read_bytes())
    there = folder / "model_index.json"
    there.write_text(json.dumps(json.loads(there.read_text()) | index))
    return folder


def add(file: Path, **values: object) -> None:
    """Put values into a JSON file."""
    file.write_text(json.dumps((json.loads(file.read_text()) if file.is_file() else {}) | values))


def header(text: str | bytes, length: int | None = None, data: bytes = b"") -> bytes:
    """A safetensors file of that header, which may lie about its length."""
    text = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(name: str = "x", kind: str = "F32", shape: tuple[int, ...] = (2,), at: tuple[int, int] = (0, 8)) -> str:
    return f'"{name}": {{"dtype": "{kind}", "shape": {json.dumps(shape)}, "data_offsets": {json.dumps(at)}}}'


SAFETENSORS = {  # what is wrong -> a file
    "empty": b"",
    "cut short": header("{" + tensor() + "}", data=bytes(4)),
    "a length of 2^62": header("{}", 2**62),
    "a length of 50 GB": header("{}", 50 * 10**9),
    "no JSON": header("no JSON at all"),
    "deep JSON": header("[" * 200_000),
    "overlapping": header("{" + tensor("a") + ", " + tensor("b", at=(4, 12)) + "}", data=bytes(12)),
    "beyond its end": header("{" + tensor(at=(0, 2**40), shape=(2**38,)) + "}", data=bytes(8)),
    "a shape that is another size": header("{" + tensor(shape=(2**40, 2**40)) + "}", data=bytes(8)),
    "an unknown type": header("{" + tensor(kind="OBJECT") + "}", data=bytes(8)),
    "negative": header("{" + tensor(shape=(-2,)) + "}", data=bytes(8)),
    "metadata that is no text": header('{"__metadata__": {"a": [1]}}'),
}


def serving(**changes: object) -> Serving:
    """A sidecar of the embedded teacher's student."""
    sampler = {n: Sampler("LCMScheduler", {"num_train_timesteps": 1000}, {"num_inference_steps": n}) for n in (1, 2)}
    lora = {"rank": 4, "alpha": 4, "scale": 1.0, "scale_range": [0.5, 1.0], "targets": ["to_q"], "loader": "diffusers"}
    plain = {"model": "stepdistill/tiny-sd", "revision": None, "variant": None, "dtype": "float32", "size": (64, 64)}
    plain |= {"name": "tiny", "pipeline": "StableDiffusionPipeline", "network": "unet", "frames": None, "fps": None}
    plain |= {"strategy": "lcm", "steps": 2, "samplers": sampler, "worn": (("student", "unet"),), "reseed": False, "lora": lora}
    plain |= {"call": {"guidance_scale": 1.0}, "prompts": ("a cat", "a dog"), "versions": {"diffusers": "0"}, "recipe": {}}
    plain |= {"recipe_hash": "abc", "files": {"diffusers": ("pytorch_lora_weights.safetensors",)}}
    return Serving(**plain | changes)
