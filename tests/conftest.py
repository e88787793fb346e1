"""Makes the helpers beside this file importable from every test below it, and what several test files start from."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: kernels run in its interpreter

import importlib.machinery
import json
import shutil
import sys
import types

import pytest
import torch
from students import CASES, student
from torch import nn

from stepdistill import perceptual
from stepdistill.data import tables
from stepdistill.export import write_export

torch.set_num_threads(1)  # the nets here are tiny: threads would wait for each other


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Case of students.CASES -> distillation, export folder; each is made when it is first asked for."""

    class Made(dict):
        def __missing__(self, case):
            teacher, strategy, overrides = CASES[case]
            folder = tmp_path_factory.mktemp(case)
            distillation, out = student(folder, teacher, *overrides, strategy=strategy), folder / "run" / "export"
            write_export(distillation, out, None if case in ("lcm-eps", "lcm-sdxl") else ("diffusers",))
            self[case] = distillation, out
            return self[case]

    return Made()


def exported(folder, teacher, strategy):
    """A distillation, and its run folder with the LoRA exported."""
    distillation = student(folder, teacher, strategy=strategy)
    write_export(distillation, folder / "run" / "export", ("diffusers",))
    return distillation, folder / "run"


@pytest.fixture(scope="session")
def exported_eps(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("eps"), "eps", "{name: lcm}")


@pytest.fixture(scope="session")
def exported_flow(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("flow"), "flow", "{name: dmd2, renoise: true}")


@pytest.fixture
def copied(made, tmp_path):
    distillation, out = made["lcm-eps"]
    return distillation, shutil.copytree(out, tmp_path / "export")


@pytest.fixture
def root(tmp_path):
    """A folder with a pipeline, prompts and captioned pictures, as far as a check looks: nothing is opened."""
    parts = {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    index = {"_class_name": "StableDiffusionPipeline", "safety_checker": [None, None], **parts}
    for part in parts:
        (tmp_path / "teacher" / part).mkdir(parents=True)
        (tmp_path / "teacher" / part / "diffusion_pytorch_model.safetensors").write_bytes(b"weights")
    (tmp_path / "teacher" / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    (tmp_path / "pictures").mkdir()
    for name in "ab":
        (tmp_path / "pictures" / f"{name}.png").write_bytes(b"picture")
        (tmp_path / "pictures" / f"{name}.txt").write_text(f"caption {name}")
    return tmp_path


class Values(list):
    """A column, as far as it is read."""

    def to_pylist(self):
        return list(self)

    def __getitem__(self, i):
        return types.SimpleNamespace(as_py=lambda: list(self)[i])


@pytest.fixture
def pyarrow(monkeypatch):
    """As much of pyarrow as reads a table, two rows a group: a function that says which table every file then holds."""
    table = {}

    class Schema(list):
        names = property(lambda self: [field.name for field in self])

    class ParquetFile:
        def __init__(self, path):
            kinds = {name: "binary" if isinstance(values[0], bytes) else "string" for name, values in table.items()}
            self.schema_arrow = Schema(types.SimpleNamespace(name=name, type=kind) for name, kind in kinds.items())
            self.num_row_groups = -(-len(next(iter(table.values()))) // 2)

        def read_row_group(self, part, columns):
            return {name: Values(table[name][2 * part : 2 * part + 2]) for name in columns}

    def holds(columns):
        table.clear(), table.update(columns), tables.opened.cache_clear(), tables.held.cache_clear()

    package, parquet = types.ModuleType("pyarrow"), types.ModuleType("pyarrow.parquet")
    package.parquet, parquet.ParquetFile = parquet, ParquetFile
    package.__spec__ = importlib.machinery.ModuleSpec("pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow", package)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)
    yield holds
    holds({})


class Squares(nn.Module):
    """Stands in for the package's network: squared differences, times a frozen weight."""

    def __init__(self, net, verbose):
        super().__init__()
        assert net == "vgg" and not verbose
        self.weight = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, a, b):
        assert not self.training and not b.requires_grad
        return self.weight * (a - b).square().flatten(1).mean(1)[:, None, None, None]  # as lpips shapes it


@pytest.fixture
def package(monkeypatch):
    """A small lpips."""
    made = types.ModuleType("lpips")
    made.LPIPS, made.__spec__ = Squares, importlib.machinery.ModuleSpec("lpips", None)
    monkeypatch.setitem(sys.modules, "lpips", made)
    perceptual.network.cache_clear()
    yield made
    perceptual.network.cache_clear()
