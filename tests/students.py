"""Distillations of tiny pipelines on disk whose students are not their teachers, so that a lost adapter shows."""

from __future__ import annotations

from pathlib import Path

import torch
from loras import save, style
from pipelines import cogvideox, flux, flux2, hunyuanvideo, ltx, lumina2, pixart, qwen_image, sana, sd, sd3, sdxl, wan, z_image

from stepdistill.assemble import Distillation, assemble
from stepdistill.recipe import dump_recipe, load_recipe
from stepdistill.sources import embedded_models


def silent_sd3(shift: float):
    """As the embedded teacher: from_pretrained wants a T5 encoder, so there is one that says nothing."""
    pipe = sd3(with_t5=True, shift=shift)
    torch.nn.init.zeros_(pipe.text_encoder_3.encoder.final_layer_norm.weight)
    return pipe


PIPELINES = {
    "eps": lambda: sd("epsilon"),
    "v": lambda: sd("v_prediction"),
    "sdxl": sdxl,
    "sdxl empty": lambda: sdxl(force_zeros=False),  # whose unconditional prediction is that of the empty prompt
    "no t5": sd3,
    "flow": lambda: silent_sd3(3.0),
    "shift1": lambda: sd3(with_t5=True, shift=1.0),
    "dual": lambda: sd3(with_t5=True, dual=(0,)),
    "flux": flux,
    "schnell": lambda: flux(guidance_embeds=False, use_dynamic_shifting=False, shift=1.0),
    "flux2": flux2,
    "klein": lambda: flux2(klein=True),
    "klein distilled": lambda: flux2(klein=True, distilled=True),
    "pixart": pixart,
    "sana": sana,
    "sana sprint": lambda: sana(sprint=True),
    "qwen image": qwen_image,
    "z image": z_image,
    "lumina2": lumina2,
    "wan": lambda: wan(boundary_ratio=0.875),
    "wan one": wan,
    "wan token times": lambda: wan(expand_timesteps=True),
    "ltx": ltx,
    "cogvideox": cogvideox,
    "cogvideox rope": lambda: cogvideox(rope=True),
    "cogvideox pairs": lambda: cogvideox(rope=True, patch_size_t=2),
    "hunyuanvideo": hunyuanvideo,
}
CASES = {  # of exports: teacher, strategy, overrides
    "lcm-eps": ("eps", "{name: lcm}", ["train.ema=0.9"]),
    "dmd2-v": ("v", "{name: dmd2}", []),
    "ddim-eps": ("eps", "{name: dmd2, renoise: false}", []),
    "lcm-sdxl": ("sdxl", "{name: lcm}", []),
    "lcm-over-a-style": ("eps", "{name: lcm}", ["model.loras=[STYLE@0.5]"]),
    "lcm-flow": ("flow", "{name: lcm}", []),
    "dmd2-flow-renoising": ("shift1", "{name: dmd2, renoise: true}", []),
    "scm-flow": ("flow", "{name: scm}", []),
    "rcm-eps": ("eps", "{name: rcm, times: [1.0, 0.5005005], steps: 2}", []),
    "reflow-eps": ("eps", "{name: reflow}", []),
    "reflow-flow": ("flow", "{name: reflow, steps: 2}", []),
    "phased-eps": ("eps", "{name: phased_dmd, phase_steps: 1}", ["train.steps=2", "train.ema=0.9"]),
    "phased-flow-whole": ("flow", "{name: phased_dmd, phase_steps: 1, renoise: true}", ["train.steps=2", "lora=null"]),
    "dmd2-flux-renoising": ("flux", "{name: dmd2, guidance: 1, renoise: true}", ["data.resolution=16"]),
    "dmd2-pixart": ("pixart", "{name: dmd2}", []),
    "dmd2-sana-sprint": ("sana sprint", "{name: dmd2, guidance: 1, renoise: true, steps: 2}", ["data.resolution=32"]),
    "boot-eps": ("eps", "{name: boot}", ["train.ema=0.9"]),
    "boot-flow": ("flow", "{name: boot}", []),
    "boot-sdxl-whole": ("sdxl", "{name: boot}", ["lora=null"]),
    "boot-flux": ("flux", "{name: boot, guidance: 1}", ["data.resolution=16"]),
    "lcm-told-guidance": ("eps", "{name: lcm, embed_guidance: 3.0}", ["lora=null"]),
    "dmd2-flow-whole": ("flow", "{name: dmd2}", ["lora=null"]),
    "dmd2-wan-renoising": ("wan", "{name: dmd2, renoise: true}", ["data.resolution=32", "data.frames=5"]),
    "phased-wan-whole": (
        *("wan", "{name: phased_dmd, phase_steps: 1}"),
        ["train.steps=2", "lora=null", "data.resolution=32", "data.frames=5"],
    ),
    "tscd-eps": ("eps", "{name: tscd, segments: [1], mix: [0.1], eta: 0.3}", ["train.ema=0.9"]),
    "tscd-own-steps-eps": ("eps", "{name: tscd, segments: [4], mix: [0.0]}", []),
    "tscd-flow": ("flow", "{name: tscd, segments: [1], mix: [0.0]}", []),
    **{f"lcm-{Path(source).name}": (source, "{name: lcm}", []) for source in embedded_models()},
}
PROMPTS = ["a large red circle", "a small blue star"]


def student(folder: Path, teacher: str = "eps", *overrides: str, strategy: str = "{name: lcm}") -> Distillation:
    """A run folder with a recipe; returns its distillation, the student moved by noise.

    The teacher is one of PIPELINES, saved beside the run, or an embedded model. STYLE in an override: a LoRA for "eps".
    """
    model, run = teacher if teacher in embedded_models() else folder / f"model-{teacher}", folder / "run"
    if teacher in PIPELINES and not model.exists():
        PIPELINES[teacher]().save_pretrained(model, safe_serialization=True)
    if "STYLE" in "".join(overrides):
        file = save(style(PIPELINES["eps"]().unet), folder / "style.safetensors")
        overrides = tuple(text.replace("STYLE", str(file)) for text in overrides)
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    run.mkdir(exist_ok=True)
    recipe = run / "recipe.yaml"
    needs = "stepdistill/tiny" if any(name in strategy for name in ("lcm", "f_distill", "scm", "rcm", "tscd")) else "null"
    recipe.write_text(
        f"name: tiny\nmodel: {{source: {model}}}\nlora: {{rank: 4}}\nstrategy: {strategy}\n"
        f"data: {{prompts: {prompts}, images: {needs}}}\ntrain: {{steps: 1}}\n"
    )
    made = assemble(load_recipe(recipe, overrides))
    recipe.write_text(dump_recipe(made.recipe))
    move(made)
    return made


@torch.no_grad()
def move(distillation: Distillation, seed: int = 0) -> None:
    """Add noise to all that the student learns; averages get other noise, so that a mix-up shows."""
    generator = torch.Generator().manual_seed(seed)
    for who, role in distillation.roles.items():
        if who.startswith("student"):
            for p in role.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=generator))


def noise(distillation: Distillation) -> torch.Tensor:
    """Latents of two samples, the same each time."""
    return torch.randn(2, *distillation.family.shape, generator=torch.Generator().manual_seed(3))
