"""A student as a ComfyUI workflow, made of its `Serving`: JSON that the program's window opens, nodes drawn left to right."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from .sidecar import Serving

NAME = "comfyui_workflow.json"
WIDTH, GAP = 320, 60  # of a column of nodes, in pixels
LINE = 24  # height of an input, an output or a widget
SAMPLED = {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "latent_image": "LATENT"}
NODES: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {  # inputs by name, and outputs, by their types
    "CheckpointLoaderSimple": ({}, ("MODEL", "CLIP", "VAE")),
    "UNETLoader": ({}, ("MODEL",)),
    "DualCLIPLoader": ({}, ("CLIP",)),
    "TripleCLIPLoader": ({}, ("CLIP",)),
    "VAELoader": ({}, ("VAE",)),
    "LoraLoaderModelOnly": ({"model": "MODEL"}, ("MODEL",)),
    "ModelSamplingSD3": ({"model": "MODEL"}, ("MODEL",)),
    "ModelSamplingFlux": ({"model": "MODEL"}, ("MODEL",)),
    "CLIPTextEncode": ({"clip": "CLIP"}, ("CONDITIONING",)),
    "FluxGuidance": ({"conditioning": "CONDITIONING"}, ("CONDITIONING",)),
    "EmptyLatentImage": ({}, ("LATENT",)),
    "EmptySD3LatentImage": ({}, ("LATENT",)),
    "KSampler": (SAMPLED, ("LATENT",)),
    "KSamplerAdvanced": (SAMPLED, ("LATENT",)),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, ("IMAGE",)),
    "SaveImage": ({"images": "IMAGE"}, ()),
}
READ = {  # pipeline: the format of LoRA file that ComfyUI reads for it, first of those written
    "StableDiffusionPipeline": ("kohya",),
    "StableDiffusionXLPipeline": ("kohya",),
    "StableDiffusion3Pipeline": ("diffusers",),
    "FluxPipeline": ("kohya", "diffusers"),
}


class Out(NamedTuple):
    """One output of a node of a graph."""

    node: int
    slot: int = 0


class Node(NamedTuple):
    kind: str
    widgets: tuple[Any, ...]
    inputs: dict[str, Out]


def workflow(told: Serving) -> dict[str, Any] | None:
    """The graph; None where ComfyUI is not known to sample this student, or where no file is there that it reads."""
    form = next((form for form in READ.get(told.pipeline, ()) if form in told.files), None)
    if told.sampler.comfyui is None or form is None:
        return None
    nodes: list[Node] = []

    def add(kind: str, *widgets: Any, **inputs: Out) -> Out:
        nodes.append(Node(kind, widgets, inputs))
        return Out(len(nodes) - 1)

    model, clip, vae = loaders(told, add)
    for lora in told.loras:
        model = add("LoraLoaderModelOnly", Path(lora.file).name, lora.scale, model=model)
    models = {}
    for (student, _), file in zip(told.worn, told.files[form], strict=True):
        worn = add("LoraLoaderModelOnly", file, told.lora["scale"], model=model)
        models[student] = shifted(told, add, worn)
    positive, negative = (add("CLIPTextEncode", text, clip=clip) for text in (told.prompts[0], ""))
    if told.pipeline == "FluxPipeline" and told.call["guidance_scale"] != 1:
        positive = add("FluxGuidance", told.call["guidance_scale"], conditioning=positive)
    flow = told.pipeline in ("StableDiffusion3Pipeline", "FluxPipeline")
    height, width = told.size
    latent = add("EmptySD3LatentImage" if flow else "EmptyLatentImage", width, height, 1)
    latent = sampled(told, add, models, {"positive": positive, "negative": negative}, latent)
    add("SaveImage", told.name, images=add("VAEDecode", samples=latent, vae=vae))
    return drawn(nodes)


def loaders(told: Serving, add: Any) -> tuple[Out, Out, Out]:
    """Model, text encoders and autoencoder of the base; their file names are what people mostly call them."""
    file = f"{Path(told.model).name}.safetensors"
    if told.pipeline == "FluxPipeline":
        clip = add("DualCLIPLoader", "clip_l.safetensors", "t5xxl_fp16.safetensors", "flux", "default")
        return add("UNETLoader", file, "default"), clip, add("VAELoader", "ae.safetensors")
    if told.pipeline == "StableDiffusion3Pipeline":
        clip = add("TripleCLIPLoader", "clip_l.safetensors", "clip_g.safetensors", "t5xxl_fp16.safetensors")
        return add("UNETLoader", file, "default"), clip, add("VAELoader", "sd3_vae.safetensors")
    base = add("CheckpointLoaderSimple", file)
    return base, Out(base.node, 1), Out(base.node, 2)


def shifted(told: Serving, add: Any, model: Out) -> Out:
    """The model with the shift of its times, where the sampler names one: `<node> <widget>` -> value."""
    shifts = {key.split()[0]: value for key, value in told.sampler.comfyui.items() if key.startswith("ModelSampling")}
    for kind, shift in shifts.items():
        height, width = told.size
        widgets = (shift, shift, width, height) if kind == "ModelSamplingFlux" else (shift,)
        model = add(kind, *widgets, model=model)
    return model


def sampled(told: Serving, add: Any, models: dict[str, Out], text: dict[str, Out], latent: Out) -> Out:
    """The latents after one sampler, or after one for each student, the later ones going on from the noise that is left."""
    words, n = told.sampler.comfyui, told.steps
    how = (n, words["cfg"], words["sampler"], words["scheduler"])
    if len(models) == 1:
        return add("KSampler", 0, "randomize", *how, 1.0, model=models[told.students[0]], **text, latent_image=latent)
    order = told.sampler.students
    for k, student in enumerate(told.students):
        first, last = order.index(student), order.index(student) + order.count(student)
        noise, left = ("enable", "disable")[k > 0], ("disable", "enable")[last < n]
        widgets = (noise, k, "fixed", *how, first, last, left)  # a seed of its own: the sampler draws noise between the steps
        latent = add("KSamplerAdvanced", *widgets, model=models[student], **text, latent_image=latent)
    return latent


def drawn(nodes: list[Node]) -> dict[str, Any]:
    """The graph in the form of ComfyUI's window: nodes with places, links between their slots."""
    links, leaving = [], {}
    for target, node in enumerate(nodes):
        for slot, (name, kind) in enumerate(NODES[node.kind][0].items()):
            source = node.inputs[name]
            links.append([len(links) + 1, source.node + 1, source.slot, target + 1, slot, kind])
            leaving.setdefault(source, []).append(len(links))
    arriving = {(link[3], link[4]): link[0] for link in links}
    made, places = [], layout(nodes)
    for k, node in enumerate(nodes):
        inputs, outputs = NODES[node.kind]
        made.append(
            {
                "id": k + 1,
                "type": node.kind,
                "pos": places[k],
                "size": [WIDTH, size(node)],
                "flags": {},
                "order": k,
                "mode": 0,
                "inputs": [
                    {"name": name, "type": kind, "link": arriving[k + 1, slot]}
                    for slot, (name, kind) in enumerate(inputs.items())
                ],
                "outputs": [
                    {"name": kind, "type": kind, "links": leaving.get(Out(k, slot), []), "slot_index": slot}
                    for slot, kind in enumerate(outputs)
                ],
                "properties": {"Node name for S&R": node.kind},
                "widgets_values": list(node.widgets),
            }
        )
    about = {"last_node_id": len(nodes), "last_link_id": len(links), "nodes": made, "links": links}
    return about | {"groups": [], "config": {}, "extra": {}, "version": 0.4}


def layout(nodes: list[Node]) -> list[list[int]]:
    """Left upper corners: each node right of all that it reads, whatever reads nothing just left of its first reader."""
    columns = [0] * len(nodes)
    for k, node in enumerate(nodes):  # in order: nodes come after what they read
        columns[k] = max((columns[source.node] + 1 for source in node.inputs.values()), default=0)
    for k, node in enumerate(nodes):
        readers = [columns[j] for j, other in enumerate(nodes) for source in other.inputs.values() if source.node == k]
        if not node.inputs and readers:
            columns[k] = min(readers) - 1
    bottom: dict[int, int] = {}
    places = []
    for k, node in enumerate(nodes):
        y = bottom.get(columns[k], 0)
        places.append([columns[k] * (WIDTH + GAP), y])
        bottom[columns[k]] = y + size(node) + GAP
    return places


def size(node: Node) -> int:
    """Height in pixels; a text is given room for several lines."""
    inputs, outputs = NODES[node.kind]
    return LINE * (1 + max(len(inputs), len(outputs)) + (6 if node.kind == "CLIPTextEncode" else len(node.widgets)))
