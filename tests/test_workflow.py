"""The workflow of an export is one that ComfyUI's window opens: links join outputs and inputs of one type, left to right."""

import dataclasses
import json

import pytest
from students import student

from stepdistill.export_files import names
from stepdistill.families import flux
from stepdistill.inference import serving
from stepdistill.workflow import workflow

SAMPLER = ["MODEL", "CONDITIONING", "CONDITIONING", "LATENT"]
TABLE = {  # of ComfyUI's nodes: types of inputs, types of outputs, number of widgets
    "CheckpointLoaderSimple": ([], ["MODEL", "CLIP", "VAE"], 1),
    "UNETLoader": ([], ["MODEL"], 2),
    "DualCLIPLoader": ([], ["CLIP"], 4),
    "TripleCLIPLoader": ([], ["CLIP"], 3),
    "VAELoader": ([], ["VAE"], 1),
    "LoraLoaderModelOnly": (["MODEL"], ["MODEL"], 2),
    "ModelSamplingSD3": (["MODEL"], ["MODEL"], 1),
    "ModelSamplingFlux": (["MODEL"], ["MODEL"], 4),
    "CLIPTextEncode": (["CLIP"], ["CONDITIONING"], 1),
    "FluxGuidance": (["CONDITIONING"], ["CONDITIONING"], 1),
    "EmptyLatentImage": ([], ["LATENT"], 3),
    "EmptySD3LatentImage": ([], ["LATENT"], 3),
    "KSampler": (SAMPLER, ["LATENT"], 7),
    "KSamplerAdvanced": (SAMPLER, ["LATENT"], 10),
    "VAEDecode": (["LATENT", "VAE"], ["IMAGE"], 0),
    "SaveImage": (["IMAGE"], [], 1),
}
PHASED = "{name: phased_dmd, phase_steps: 1}"
CASES = {
    "sd": ("eps", [], "{name: lcm}"),
    "styled": ("eps", ["model.loras=[STYLE@0.5]"], "{name: lcm}"),
    "phased": ("eps", ["train.steps=2"], PHASED),
    "phased-renoising": ("eps", ["train.steps=2"], "{name: phased_dmd, phase_steps: 1, renoise: true}"),
    "sdxl": ("sdxl", [], "{name: lcm}"),
    "sd3": ("flow", [], "{name: dmd2}"),
    "flux": ("flux", ["data.resolution=16"], "{name: dmd2, guidance: 1, renoise: true}"),
}


def told(distillation, formats=None):
    made = serving(distillation)
    return dataclasses.replace(made, files=names(distillation, made, formats))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Case -> how the student is served, its workflow as it is read from the file."""
    found = {}
    for case, (teacher, overrides, strategy) in CASES.items():
        made = told(student(tmp_path_factory.mktemp(case), teacher, *overrides, strategy=strategy))
        found[case] = made, json.loads(json.dumps(workflow(made)))
    return found


@pytest.mark.parametrize("case", CASES)
def test_its_links_fit(drawn, case):
    _, graph = drawn[case]
    nodes = {node["id"]: node for node in graph["nodes"]}
    assert len(nodes) == len(graph["nodes"]) and graph["last_node_id"] == max(nodes)
    links = {link[0]: link[1:] for link in graph["links"]}
    assert len(links) == len(graph["links"]) and graph["last_link_id"] == max(links)
    for node in nodes.values():
        inputs, outputs, widgets = TABLE[node["type"]]
        assert [slot["type"] for slot in node["inputs"]] == inputs
        assert [slot["type"] for slot in node["outputs"]] == outputs
        assert len(node["widgets_values"]) == widgets
    for number, (source, out, target, into, kind) in links.items():
        assert nodes[source]["outputs"][out]["type"] == nodes[target]["inputs"][into]["type"] == kind
        assert number in nodes[source]["outputs"][out]["links"] and nodes[target]["inputs"][into]["link"] == number
        assert nodes[source]["order"] < nodes[target]["order"]
        assert nodes[source]["pos"][0] + nodes[source]["size"][0] < nodes[target]["pos"][0]  # left to right
    assert all(slot["link"] in links for node in nodes.values() for slot in node["inputs"])
    assert {number for node in nodes.values() for slot in node["outputs"] for number in slot["links"]} == set(links)


@pytest.mark.parametrize("case", CASES)
def test_no_node_covers_another(drawn, case):
    boxes = [(*node["pos"], *node["size"]) for node in drawn[case][1]["nodes"]]
    for k, (x, y, w, h) in enumerate(boxes):
        for a, b, c, d in boxes[:k]:
            assert x + w <= a or a + c <= x or y + h <= b or b + d <= y


def only(graph, kind):
    (node,) = [node for node in graph["nodes"] if node["type"] == kind]
    return node


def all_of(graph, kind):
    return [node["widgets_values"] for node in graph["nodes"] if node["type"] == kind]


def test_what_it_says(drawn):
    made, graph = drawn["sd"]
    assert only(graph, "KSampler")["widgets_values"] == [0, "randomize", 4, 1.0, "lcm", "simple", 1.0]
    assert all_of(graph, "LoraLoaderModelOnly") == [["tiny_kohya.safetensors", 1.0]]  # PEFT's spelling would lose attention
    assert all_of(graph, "CLIPTextEncode") == [[made.prompts[0]], [""]]
    assert only(graph, "EmptyLatentImage")["widgets_values"] == [16, 16, 1]
    assert all_of(drawn["styled"][1], "LoraLoaderModelOnly") == [["style.safetensors", 0.5], ["tiny_kohya.safetensors", 1.0]]
    assert only(drawn["sd3"][1], "ModelSamplingSD3")["widgets_values"] == [3.0]
    assert all_of(drawn["sd3"][1], "LoraLoaderModelOnly") == [["pytorch_lora_weights.safetensors", 1.0]]
    assert only(drawn["flux"][1], "FluxGuidance")["widgets_values"] == [3.5]
    first, second, width, height = only(drawn["flux"][1], "ModelSamplingFlux")["widgets_values"]
    assert first == second and (width, height) == (16, 16)
    assert str(drawn["sd"][0].base) not in json.dumps(graph)  # no path of this machine


def test_students_take_turns(drawn):
    """The second goes on where the first stopped, with noise of its own between the steps."""
    _, graph = drawn["phased-renoising"]
    first, second = all_of(graph, "KSamplerAdvanced")
    how = [4, 1.0, "lcm", "simple"]
    assert first == ["enable", 0, "fixed", *how, 0, 2, "enable"] and second == ["disable", 1, "fixed", *how, 2, 4, "disable"]
    links = {link[0]: link for link in graph["links"]}
    nodes = [node for node in graph["nodes"] if node["type"] == "KSamplerAdvanced"]
    assert links[nodes[1]["inputs"][3]["link"]][1] == nodes[0]["id"]
    loaders = {node["id"]: node["widgets_values"][0] for node in graph["nodes"] if node["type"] == "LoraLoaderModelOnly"}
    files = [loaders[links[node["inputs"][0]["link"]][1]] for node in nodes]
    assert files == ["tiny_student_1_kohya.safetensors", "tiny_student_2_kohya.safetensors"]


def test_a_flux_student_of_the_real_width_is_loaded_from_kohyas_file(tmp_path, monkeypatch):
    monkeypatch.setattr(flux, "WIDTH", 32)
    teacher, overrides, strategy = CASES["flux"]
    graph = workflow(told(student(tmp_path, teacher, *overrides, strategy=strategy)))
    assert all_of(graph, "LoraLoaderModelOnly") == [["tiny_kohya.safetensors", 1.0]]


@pytest.mark.parametrize(
    ("teacher", "overrides", "formats"),
    [("eps", ["strategy.steps=3"], None), ("v", [], None), ("eps", [], ("diffusers",)), ("eps", ["lora=null"], None)],
)
def test_what_comfyui_cannot_sample_or_load_has_none(tmp_path, teacher, overrides, formats):
    assert workflow(told(student(tmp_path, teacher, *overrides), formats)) is None
