"""What a card says besides its snippet: what to know, how to combine the student with other LoRAs, where files go."""

from __future__ import annotations

import re
from pathlib import Path

from .sidecar import WHOLE, Serving
from .workflow import NAME as WORKFLOW
from .workflow import READ, workflow


def notes(told: Serving) -> str:
    """What somebody who uses it must know."""
    guidance = told.call.get("guidance_scale", 1)
    lines = ["Negative prompts have no effect: without classifier-free guidance nothing reads them."]
    unguided = next((name for name in ("true_cfg_scale", "guidance_scale") if name in told.call), None)
    if guidance in (0, 1):  # Z-Image counts from 0
        lines.append(
            f"Leave `{unguided}` at {told.call[unguided]:g}: guidance is distilled in, and more of it burns the picture."
        )
    else:
        lines.append(f"The network is told its guidance scale; {guidance:g} is what it was made for.")
    if told.reseed:
        lines.append(
            "The scheduler draws new noise at every step, and this pipeline does not hand it the `generator`: "
            "a picture is reproducible only through `torch.manual_seed`, which the snippet calls."
        )
    if told.frames is not None:
        lines.append(
            f'For an MP4: `diffusers.utils.export_to_video(frames, "video.mp4", fps={told.fps:g})`, which needs imageio and '
            f"imageio-ffmpeg."
        )
    if told.lora:
        low, high = told.lora["scale_range"]
        how = f" (`pipe.set_adapters(pipe.get_active_adapters(), [{low:g}])`)" if len(told.worn) == 1 else ""
        how = "" if told.lora.get("loader") == "peft" else how
        lines.append(
            f"LoRA scale {told.lora['scale']:g} is what was trained; on other fine-tunes of the same base try {low:g} "
            f"to {high:g}{how}."
        )
    if told.quantize:
        lines.append(
            f"It was trained over a base quantized to {told.quantize}, as the snippet loads it; the LoRA loads on the base as "
            "it is too: leave `quantization_config` out. Pictures then differ a little, as the two bases do."
        )
    if told.quantize == "nf4":
        lines.append("diffusers quantizes to nf4 on a GPU only.")
    if told.take_turns:
        lines.append("Each student takes its own steps, and none can take another's.")
        if told.lora:
            lines[-1] += " In ComfyUI that is one KSampler (Advanced) for each LoRA, one after the other; A1111 cannot."
    if told.sampler.told is not None:
        lines.append(
            "No stock scheduler tells a network another time than its own: the snippet wraps the network, and "
            "`stepdistill.load_pipeline` does it too. ComfyUI and A1111 cannot."
        )
    local = [place for place in (told.base, *(lora.place for lora in told.loras)) if Path(place).is_absolute()]
    lines += [f"{quoted(place)} is a folder of the machine that exported this; elsewhere, mend the path." for place in local]
    made = told.versions["diffusers"]
    lines.append(f"Made with diffusers {made}: all classes named here are its own, and an older one may lack some.")
    return "\n".join(f"- {line}" for line in lines)


def combining(told: Serving) -> str:
    """Python that puts another LoRA beside the student's; nothing where there is no single LoRA."""
    if told.lora is None or told.lora.get("loader") == "peft" or len(told.worn) > 1 or "diffusers" not in told.files:
        return ""
    lines = [
        f'pipe.load_lora_weights(here, weight_name="{told.files["diffusers"][0]}", adapter_name="few_step")',
        'pipe.load_lora_weights("style.safetensors", adapter_name="style")',
        'pipe.set_adapters(["few_step", "style"], [1.0, 0.7])',
    ]
    text = "A LoRA of a style or character, made for the same base, goes beside this one; instead of the load above:"
    more = "Scheduler, steps and guidance stay. If the picture burns, lower the style first. As one file: `stepdistill merge`."
    return f"{text}\n\n```python\n" + "\n".join(lines) + f"\n```\n\n{more}"


def places(told: Serving) -> str:
    """A list of where other programs want the files; nothing where they read none."""
    lines = []
    form = next((form for form in READ.get(told.pipeline, ()) if form in told.files), None)
    if told.lora and form:
        files = ", ".join(f"`{file}`" for file in told.files[form])
        opened = f"; then open `{WORKFLOW}` in its window" if workflow(told) else ""
        lines.append(f"ComfyUI: {files} into `models/loras`{opened}.")
        if told.sampler.a1111 and "kohya" in told.files:
            how = ", ".join(f"{name} {value}" for name, value in told.sampler.a1111.items())
            name = Path(told.files[form][0]).stem
            lines.append(f"A1111, Forge: {files} into `models/Lora`, and `<lora:{name}:1>` in the prompt; {how}.")
    if any(form in WHOLE for form in told.files):
        lines.append("A whole pipeline is a folder for diffusers; other programs want it converted.")
    return "\n".join(f"- {line}" for line in lines)


def literal(text: str) -> str:
    """Text in double quotes as Python and YAML both read it, on one line; what does not print is escaped."""
    escapes = {'"': '\\"', "\\": "\\\\", "\n": "\\n"}
    return '"' + "".join(escapes.get(c) or (c if c.isprintable() else _escape(c)) for c in text) + '"'


def _escape(c: str) -> str:
    return f"\\x{ord(c):02x}" if ord(c) < 256 else f"\\u{ord(c):04x}" if ord(c) < 2**16 else f"\\U{ord(c):08x}"


def plain(text: str) -> str:
    """Text that Markdown shows as it is: no markup, no HTML, on one line."""
    return re.sub(r"([\\`*\[\]<>&#!~])", r"\\\1", " ".join(printing(text).split()))


def printing(text: str) -> str:
    """Text on one line, with blanks for what does not print."""
    return "".join(c if c.isprintable() else " " for c in text)


def quoted(text: str) -> str:
    """Text as code in Markdown, whatever backticks it has, on one line."""
    text = printing(text)
    ticks = "`"
    while ticks in text:
        ticks += "`"
    return f"{ticks}{text}{ticks}" if len(ticks) == 1 else f"{ticks} {text} {ticks}"
