"""docs/families.md: its table is of the families, and its example of a new one owes what every family owes."""

import ast
import copy
import re
import types
from pathlib import Path

import pytest
import test_conformance
from pipelines import aura_flow
from students import PIPELINES
from test_conformance import (  # noqa: F401 - collected here again, with this module's `made`
    CASES,
    Case,
    Made,
    test_decode_is_the_pipeline_s,
    test_encode_undoes_decode,
    test_features_are_tokens_of_each_sample,
    test_forward_is_the_pipeline_s_prediction,
    test_guided_is_the_pipeline_s_guidance,
    test_samples_are_independent,
    test_sizes_are_the_pipeline_s,
)

from stepdistill.families import FAMILIES

PAGE = (Path(__file__).resolve().parent.parent.parent / "docs" / "families.md").read_text(encoding="utf-8")


PARTS = {  # of a network: what the names of its layers hold
    "attention": ("to_q",),
    "feed-forward": ("ff.", "ffn.", "mlp", "feed_forward.", "linear_in", "conv_inverted", "w1"),
    "convolutions": ("conv1",),
    "modulation": ("norm", "_mod", "adaln", "adaLN", "time_emb", "time_proj"),
}


def form(family) -> str:
    """The form of one sample's latents: which of their sides grow with the height, the width, the length of what is drawn."""
    shapes = [family.latent_shape(*size) for size in ((64, 64), (128, 64), (64, 128))]
    family.frames = family.frames and 2 * family.frames - 1
    sides = zip(*shapes, family.latent_shape(64, 64), strict=True)
    return " ".join("h" if h > one else "w" if w > one else "t" if t > one else "c" for one, h, w, t in sides)


def cells(pipeline: str, pipe) -> str:
    """What the page's table says of a pipeline, as its family says it of a tiny one."""
    kind = FAMILIES[pipeline]
    family = kind(pipe, (64, 64), kind.frames and 17)
    wears = [part for part, names in PARTS.items() if any(name in layer for name in names for layer in kind.lora_targets)]
    guidance = {True: "distilled", False: "guided"}.get(kind.guidance_distilled, "guided or distilled")
    return f"| `{pipeline}` | {family.kind} | {form(family)} | {guidance} | {', '.join(wears)} |"


def added() -> dict[str, list[str]]:
    """The lines that the page's diff adds, by file."""
    (diff,) = re.findall("```diff\n(.*?)```", PAGE, re.DOTALL)
    assert len(diff.splitlines()) < 25
    files: dict[str, list[str]] = {}
    for line in diff.splitlines():
        if line.startswith("+++ b/"):
            lines = files.setdefault(line.removeprefix("+++ b/"), [])
        elif not line.startswith("--- "):
            assert line.startswith("+")
            lines.append(line[1:])
    return files


def example() -> type:
    """The family that the page adds."""
    module = types.ModuleType("stepdistill.families.aura_flow")
    module.__package__ = "stepdistill.families"
    exec("\n".join(added()["stepdistill/families/aura_flow.py"]), module.__dict__)
    return module.AuraFlow


@pytest.fixture(scope="module")
def made():
    pipe, case = aura_flow(), Case()
    return Made(case, example()(copy.deepcopy(pipe), case.sizes[0]), pipe)


def test_the_example_is_registered_by_two_lines():
    imported, row = added()["stepdistill/families/__init__.py"]
    name, kind = next(iter(ast.literal_eval("{" + row.replace(": ", ": '").replace(",", "'") + "}").items()))
    assert imported == f"from .aura_flow import {kind}" and example().pipeline == name and example().__name__ == kind


def test_the_example_trains_and_is_exported(tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILIES, "AuraFlowPipeline", example())
    monkeypatch.setitem(PIPELINES, "aura flow", aura_flow)
    monkeypatch.setitem(CASES, "aura flow", Case())
    test_conformance.test_a_trained_lora_is_loaded_by_a_stock_pipeline("aura flow", tmp_path)


def test_the_table_is_of_the_families():
    pipes = {type(pipe).__name__: pipe for pipe in (build() for build in reversed(PIPELINES.values()))}
    rows = [line for line in PAGE.splitlines() if line.startswith("| `")]
    assert sorted(row.split("`")[1] for row in rows) == sorted(FAMILIES)  # tests that hide one put it back at the end
    for row in rows:
        pipeline = row.split("`")[1]
        assert row.startswith(cells(pipeline, pipes[pipeline]))
