"""The files of an export: which there are, and a writer for each."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .assemble import Distillation, trained
from .errors import UserError
from .families.load import load_pipeline_folder, quiet
from .families.loras import fuse_loras
from .kohya import kohya_state
from .lora_files import kohya_header, peft_state
from .lora_sources import NAME
from .roles import fold_lora
from .sidecar import Part, Serving

FORMATS = ("diffusers", "kohya", "fused")


def names(distillation: Distillation, told: Serving, formats: Sequence[str] | None) -> dict[str, tuple[str, ...]]:
    """The files to write, format to a name for each of `worn`, the one that a snippet should load first.

    Raises:
        UserError: a format that these students or this family have not.
    """
    recipe, family, students = distillation.recipe, distillation.family, told.students
    suffixes = [f"_{network}" * (network != told.network) for _, network in told.worn]
    if told.take_turns:
        suffixes = [f"_{student}" for student in students]
    if recipe.lora is None:
        for form in set(formats or ()) - {"diffusers"}:
            raise UserError(f"format {form} needs a LoRA, but lora is null, so a whole pipeline is written; leave it out")
        return {"pipeline": ("pipeline", *(students[1:] if told.take_turns else ()))}
    files = {
        "diffusers": tuple(f"{s[1:] if told.take_turns else Path(NAME).stem + s}.safetensors" for s in suffixes),
        "kohya": tuple(f"{recipe.name}{suffix}_kohya.safetensors" for suffix in suffixes),
        "fused": ("fused",),
    }
    lacks = {"kohya": why} if (why := family.kohya_lack() or no_place(distillation)) else {}
    if told.sampler.told is not None:
        lacks["kohya"] = "no program that reads kohya files tells a network another time than its sampler's"
    if recipe.model.quantize:
        lacks["fused"] = "a quantized base cannot take the LoRA in, and on one that is not, it is not what was checked"
    lacks |= {} if not told.take_turns else {"fused": f"one fused network cannot hold {len(students)} students"}
    fits = [form for form in FORMATS if form not in lacks]
    for form in formats or ():
        if form not in fits:
            raise UserError(f"format {form}: {lacks.get(form, 'there is no such format')}; choose from {', '.join(fits)}")
    wanted = formats or [form for form in fits if form != "fused"]
    return {form: files[form] for form in fits if form in wanted}


def write_lora(distillation: Distillation, told: Serving, part: Part, file: Path) -> None:
    header = {"format": "pt", "stepdistill.inference": told.to_json()}
    save_file(lora_state(distillation, part), file, header)


def write_kohya(distillation: Distillation, told: Serving, part: Part, file: Path) -> None:
    family, config = distillation.family, distillation.family.net.config
    state = kohya_weights(distillation, part)
    text = config.get("cross_attention_dim") or (config.joint_attention_dim if config.guidance_embeds else 0)
    save_file(state, file, kohya_header(state, told, text, family.kind))


def kohya_weights(distillation: Distillation, part: Part) -> dict[str, Tensor]:
    """A student's LoRA (of its average, if it has one), as kohya's files name and join it.

    Raises:
        ValueError: they have no place for some layers.
    """
    family = distillation.family
    outputs = {name: layer.out_features for name, layer in family.net.named_modules() if hasattr(layer, "out_features")}
    rank = distillation.recipe.lora.rank
    return kohya_state(weights(distillation, part), family.kohya_prefix, rank, family.kohya_layers, outputs)


def no_place(distillation: Distillation) -> str:
    """What kohya's files cannot hold of this family's LoRA, in words; nothing if they hold all of it."""
    try:
        kohya_weights(distillation, (trained(distillation.strategy)[0], distillation.family.net_name))
    except ValueError as error:
        return str(error)
    return ""


def write_fused(distillation: Distillation, told: Serving, _part: Part, folder: Path) -> None:
    with quiet():
        pipe = load_pipeline_folder(
            told.model, getattr(torch, told.dtype), told.revision, told.variant, trusted=distillation.recipe.trust_remote_code
        )
        fuse_loras(pipe, told.loras)
        if told.lora["loader"] == "peft":  # this pipeline of diffusers knows of no LoRAs
            fold_lora(getattr(pipe, told.network), weights(distillation, told.worn[0]))
        else:
            for part in told.worn:
                pipe.load_lora_weights(lora_state(distillation, part), **told.into(part[1]))
            pipe.fuse_lora(components=list(distillation.family.networks))
            pipe.unload_lora_weights()
        pipe.scheduler = told.build_scheduler()
        pipe.save_pretrained(folder, safe_serialization=True)


def write_pipeline(distillation: Distillation, told: Serving, part: Part, folder: Path) -> None:
    """The whole pipeline, with the first of students who take turns; of the others the network. They are float32; whoever
    loads them chooses the type."""
    students, inner = distillation.students(), distillation.family.networks
    nets = {(who, name): students[who].net.get_submodule(inner[name].removesuffix(".")) for who, name in told.worn}
    if part != told.worn[0]:
        nets[part].save_pretrained(folder, safe_serialization=True)
        return
    pipe = copy.copy(distillation.family.pipe)  # shares its parts; what is registered below, only the copy has
    shown = [part] if told.take_turns else told.worn
    with quiet():
        pipe.register_modules(**{name: nets[who, name] for who, name in shown}, scheduler=told.build_scheduler())
        pipe.save_pretrained(folder, safe_serialization=True)


Writer = Callable[[Distillation, Serving, Part, Path], None]
WRITERS: dict[str, Writer] = {
    "diffusers": write_lora,
    "kohya": write_kohya,
    "fused": write_fused,
    "pipeline": write_pipeline,
}


def weights(distillation: Distillation, part: Part) -> dict[str, Tensor]:
    """What a student (its average, if it has one) learnt on one network of the pipeline, by name in that network."""
    student, network = part
    inner = distillation.family.networks[network]
    found = distillation.students()[student].named_parameters()
    return {name.removeprefix(inner): p for name, p in found.items() if name.startswith(inner)}


def lora_state(distillation: Distillation, part: Part) -> dict[str, Tensor]:
    """The same as diffusers names it: whatever the network, after the pipeline's first."""
    return peft_state(weights(distillation, part), distillation.family.net_name)
