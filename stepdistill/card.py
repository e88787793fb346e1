"""The model card of an export, made of its `Serving`: what it is, a snippet that runs as printed, settings, figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .card_notes import combining, literal, notes, places, plain, quoted
from .lora_sources import LoraSource
from .sidecar import WHOLE, Serving

HUB = "https://huggingface.co"
FIGURES = (
    *("who", "steps", "nfe", "guidance", "solver", "n", "fd", "fd_low", "fd_high", "kid", "patch_fd", "cmmd", "recall"),
    *("alignment", "clip", "diversity", "fidelity", "ms"),
)
QUANTIZED = {  # to what: what diffusers must bring, what else is imported, how a network is quantized
    None: ([], [], ""),
    "int8": (
        ["PipelineQuantizationConfig", "TorchAoConfig"],
        ["from torchao.quantization import Int8WeightOnlyConfig"],
        "TorchAoConfig(Int8WeightOnlyConfig())",
    ),
    "nf4": (
        ["BitsAndBytesConfig", "PipelineQuantizationConfig"],
        [],
        'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.{})',
    ),
}


def card(told: Serving, results: Sequence[Any] = (), picture: str | None = None, gallery: Sequence[str] = ()) -> str:
    """README.md.

    results: JSON values (of eval/*.json) with rows of figures at any depth; picture: a file beside the card; gallery: files
    beside it, one for each of the first of `told.prompts`, drawn by the student.
    """
    parts = [header(told, gallery), f"# {told.name}\n\n{about(told)}", *["<Gallery />"] * bool(gallery)]
    parts += ["## Use", f"```python\n{snippet(told)}\n```", notes(told)]
    if other := combining(told):
        parts += ["## With another LoRA", other]
    parts += ["## Settings", settings(told)]
    if files := places(told):
        parts += ["## In other programs", files]
    if found := [(result, rows(result)) for result in results if rows(result)]:
        parts.append("## Figures")
        for result, of in found:  # each in a table of its own: figures of several protocols do not compare
            parts += [*measured(result), figures(of)]
    if picture:
        parts += ["## Samples", f"![The teacher's rows beside the student's]({picture})"]
    return "\n\n".join(parts) + "\n"


def header(told: Serving, gallery: Sequence[str] = ()) -> str:
    """What the Hub reads."""
    task = "text-to-image" if told.frames is None else "text-to-video"
    tags = [task, "diffusers", "few-step", "stepdistill", told.strategy]
    tags += ["lora", "template:sd-lora"] if told.lora else []
    fields = {
        "library_name": "diffusers",
        "pipeline_tag": task,
        "tags": tags,
    }
    if not Path(told.base).is_absolute():  # a folder is no name on the Hub
        fields |= {"base_model": told.model, "base_model_relation": "adapter" if told.lora else "finetune"}
        fields |= {"license": "other", "license_name": "that-of-the-base-model", "license_link": f"{HUB}/{told.model}"}
    if gallery:
        shown = zip(told.prompts, gallery, strict=False)
        fields["widget"] = [{"text": prompt, "output": {"url": file}} for prompt, file in shown]
    return "\n".join(["---", *(f"{key}: {_yaml(value)}" for key, value in fields.items()), "---"])


def about(told: Serving) -> str:
    n = len(told.worn)
    if told.take_turns:
        what = f"{n} LoRAs (rank {told.lora['rank']}) that" if told.lora else f"{n} networks that"
        what += " take turns to make"
    elif told.lora and n > 1:
        what = f"{n} LoRAs (rank {told.lora['rank']}), one for each expert, that make"
    else:
        what = f"A LoRA (rank {told.lora['rank']}) that makes" if told.lora else "A whole pipeline that makes"
    made = "picture" if told.frames is None else f"video of {told.frames} frames"
    return (
        f"{what} {quoted(told.model)} draw in {told.steps} network evaluation{'s' * (told.steps > 1)} "
        f"a {made} at {told.size[1]} x {told.size[0]}, distilled with the strategy `{told.strategy}` of stepdistill. "
        f"The licence is that of the base model."
    )


def snippet(told: Serving) -> str:
    """Python that needs diffusers alone, and runs in the folder of the card."""
    form, files = next(iter(told.files.items()))
    scheduler, options = told.sampler.scheduler, {"revision": told.revision, "variant": told.variant}
    classes, imports, how = QUANTIZED[told.quantize]
    networks = ", ".join(f'"{name}": how' for name in dict.fromkeys(network for _, network in told.worn))
    source = literal(told.base) + "".join(f", {name}={literal(x)}" for name, x in options.items() if x)
    source += ", quantization_config=quantized" * bool(how)
    if form in WHOLE:
        source = f'f"{{here}}/{files[0]}"'
    by_peft = form not in WHOLE and told.lora.get("loader") == "peft"
    lines = [
        *(["import inspect", ""] if told.sampler.told is not None else []),
        *(["import peft"] if by_peft else []),
        "import torch",
        f"from diffusers import {', '.join(sorted([scheduler, told.pipeline, *classes]))}",
        *imports,
        *(["from safetensors.torch import load_file"] if by_peft else []),
        "",
        'here = "."  # the folder of this card' + ("" if form in WHOLE or by_peft else ", or its name on the Hub"),
        *([f"how = {how.format(told.dtype)}"] if how else []),
        *([f"quantized = PipelineQuantizationConfig(quant_mapping={{{networks}}})"] if how else []),
        f"pipe = {told.pipeline}.from_pretrained({source}, dtype=torch.{told.dtype})",
    ]
    if form not in WHOLE:
        lines += [line for lora in told.loras for line in below(lora)]
    if by_peft:
        lines += put_on(told, files[0])
    elif form not in WHOLE and not told.take_turns:
        for (_, network), file in zip(told.worn, files, strict=True):
            into = "".join(f", {name}={x}" for name, x in told.into(network).items())
            lines.append(f'pipe.load_lora_weights(here, weight_name="{file}"{into})')
    lines += [
        'pipe.to("cuda" if torch.cuda.is_available() else "cpu")',
        f'pipe.scheduler = {scheduler}.from_pretrained(here, subfolder="scheduler")',
        *(turns(told, form, files) if told.take_turns else []),
        *(another_time(told) if told.sampler.told is not None else []),
        "image = pipe(" if told.frames is None else "frames = pipe(",
        f"    prompt={literal(told.prompts[0])},",
        *(f"    {name}={value!r}," for name, value in told.arguments.items()),
        *["    callback_on_step_end=take_turns,"] * told.take_turns,
        "    generator=torch.manual_seed(0),",
    ]
    if told.frames is None:
        lines += [").images[0]", 'image.save("picture.png")']
    else:
        options = _arguments(told.animation)
        lines += ['    output_type="pil",', ").frames[0]"]
        lines += [f'frames[0].save("video.webp", save_all=True, append_images=frames[1:], {options})']
    return "\n".join(lines)


def put_on(told: Serving, file: str) -> list[str]:
    """Lines that put a LoRA on the network of a pipeline which loads none."""
    net, rank = f"pipe.{told.network}", told.lora["rank"]
    return [
        f'lora = {{key.removeprefix("{told.network}."): x for key, x in load_file(f"{{here}}/{file}").items()}}',
        'layers = sorted({key.split(".lora_")[0] for key in lora})',
        f"config = peft.LoraConfig(r={rank}, lora_alpha={rank}, target_modules=layers)",
        f"peft.inject_adapter_in_model(config, {net})  # diffusers loads no LoRAs into this pipeline",
        f"peft.set_peft_model_state_dict({net}, lora)",
    ]


def below(lora: LoraSource) -> list[str]:
    """Lines that fuse a LoRA which the student was distilled over."""
    source = f"{literal(lora.place)}, weight_name={literal(lora.file)}"
    return [
        f"pipe.load_lora_weights({source})  # what it was distilled over",
        f"pipe.fuse_lora(lora_scale={lora.scale:g})",
        "pipe.unload_lora_weights()",
    ]


def another_time(told: Serving) -> list[str]:
    """Lines that let the network hear another time than its scheduler's."""
    options = f"{told.sampler.told}, dtype=torch.float32"
    return [
        "",
        "",
        f"def hear(net, args, kwargs):  # at whatever timestep, the network is told {told.sampler.told:g}",
        "    call = inspect.signature(net.forward).bind(*args, **kwargs)",
        f'    call.arguments["timestep"] = torch.full_like(call.arguments["timestep"], {options})',
        "    return call.args, call.kwargs",
        "",
        "",
        f"pipe.{told.network}.register_forward_pre_hook(hear, with_kwargs=True)",
    ]


def turns(told: Serving, form: str, files: Sequence[str]) -> list[str]:
    """Lines that load several students, and let each take its own steps."""
    students, net = told.students, f"pipe.{told.network}"
    if form in WHOLE:
        options = f"subfolder=name, dtype=torch.{told.dtype}"
        lines = [f'students = {{"{students[0]}": {net}}}', f"for name in {json.dumps(students[1:])}:"]
        lines += [f"    students[name] = type({net}).from_pretrained(here, {options}).to({net}.device)"]
        order, wear = "[" + ", ".join(f'students["{name}"]' for name in told.sampler.students) + "]", f"{net} = order[{{}}]"
    else:
        lines = [
            f'pipe.load_lora_weights(here, weight_name="{file}", adapter_name="{student}")'
            for student, file in zip(students, files, strict=True)
        ]
        order, wear = json.dumps(told.sampler.students), "pipe.set_adapters(order[{}])"
    return [
        *lines,
        "",
        f"order = {order}  # who takes each step",
        wear.format(0),
        "",
        "",
        "def take_turns(pipe, step, timestep, tensors):  # after each step; after the last one the first is back",
        f"    {wear.format('(step + 1) % len(order)')}",
        "    return tensors",
        "",
        "",
    ]


def settings(told: Serving) -> str:
    """A table of all numbers of steps: what differs from the saved scheduler, and the words of other programs."""
    table = [["steps", "scheduler", "arguments of pipe(...)", "ComfyUI", "A1111"]]
    for n, sampler in told.samplers.items():
        other = told.at(n)
        if sampler.scheduler == told.sampler.scheduler:
            changed = {k: v for k, v in sampler.config.items() if told.sampler.config.get(k) != v}
            kind = "as saved" if not changed else f"saved, with {plain(_arguments(changed))}"
        else:
            kind = f"{sampler.scheduler}: see stepdistill.json"
        words = [_words(sampler.comfyui), _words(sampler.a1111)]
        table.append([f"**{n}**" if n == told.steps else str(n), kind, quoted(_arguments(other.arguments)), *words])
    text = _table(table)
    if any("saved, with" in row[1] for row in table):
        name = told.sampler.scheduler
        text += f'\n\n*saved, with x=y* is `{name}.from_pretrained(here, subfolder="scheduler", x=y)`.'
    return text + "\n\n`-` means that no equivalent is known. All of it, for programs, is in `stepdistill.json`."


def rows(result: Any) -> list[Mapping[str, Any]]:
    """Every mapping with an `fd` or `alignment` inside a JSON value."""
    if isinstance(result, Mapping):
        if "fd" in result or "alignment" in result:
            known = isinstance(result.get("fd", 0.0), int | float) and isinstance(result.get("steps", 0), int)
            return [result] if known else []
        return [row for value in result.values() for row in rows(value)]
    return [row for value in result for row in rows(value)] if isinstance(result, list) else []


def measured(result: Any) -> list[str]:
    """By which protocol a result was measured, in words, if it says so."""
    about = _within(result, "provenance", "compared") if isinstance(result, Mapping) else {}
    if not isinstance(about.get("n"), int):
        return []
    return [f"Measured by the preset {quoted(str(about.get('preset')))} of stepdistill on {about['n']:,} pictures."]


def _within(result: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """The mapping in a mapping; empty if there is none."""
    for key in keys:
        value = result.get(key)
        result = value if isinstance(value, Mapping) else {}
    return result


def figures(found: Sequence[Mapping[str, Any]]) -> str:
    """A table of evaluation results; of rows that differ in the solver alone, the one with the lowest FD."""
    best: dict[tuple, Mapping[str, Any]] = {}
    for row in found:
        key = tuple(row.get(name) for name in ("who", "steps", "guidance", "n"))
        if key not in best or row.get("fd", 0) < best[key].get("fd", 0):
            best[key] = row
    keys = [key for key in FIGURES if any(row.get(key) not in (None, "") for row in best.values())]
    return _table([keys, *([_shown(row.get(key)) for key in keys] for row in best.values())])


def newest_grid(folder: Path) -> Path | None:
    """The last of a run's sample grids, if there are any."""
    return max(folder.glob("*.png"), key=lambda file: (len(file.stem), file.stem), default=None)


def _yaml(value: Any) -> str:
    """Texts, and lists and mappings of them, in YAML on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{literal(key)}: {_yaml(x)}" for key, x in value.items()) + "}"
    return "[" + ", ".join(map(_yaml, value)) + "]" if isinstance(value, list) else literal(value)


def _table(lines: Sequence[Sequence[str]]) -> str:
    cells = ([cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines)
    head, *body = ("| " + " | ".join(line) + " |" for line in cells)
    return "\n".join([head, "|" + " --- |" * len(lines[0]), *body])


def _arguments(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


def _words(values: Mapping[str, Any] | None) -> str:
    return plain(", ".join(f"{name} {value}" for name, value in values.items())) if values else "-"


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else plain(str(value)[:200])
