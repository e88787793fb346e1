"""From a trained student to files that stock diffusers, ComfyUI and A1111 load, and the proof that they are it.

pytorch_lora_weights.safetensors   diffusers: prefixed PEFT keys, float32, alpha equal to rank
<name>_kohya.safetensors           ComfyUI, A1111, Forge, sd-scripts (families that need it)
fused/ or pipeline/                a whole pipeline: the LoRA merged, or (lora: null) the trained copy
student_1.safetensors, ...         where several students take turns: a file each, in both LoRA formats; of whole copies,
                                   the first is in pipeline/, the others are networks in student_2/, ...
pytorch_lora_weights_transformer_2.safetensors   of the second expert, where a pipeline has two
scheduler/scheduler_config.json
comfyui_workflow.json              where ComfyUI is known to sample the student: to be opened in its window
gallery/                           pictures that it drew
stepdistill.json, README.md        how to sample it: `sidecar.Serving`, and the card made of it
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from . import distributed
from .assemble import AVERAGE, Distillation, restore_run
from .card import card, newest_grid
from .devices import placed, tiled
from .errors import UserError
from .evaluate.walks import to_pixels
from .export_files import WRITERS, lora_state, names
from .families.load import quiet
from .files import beside, naming, recover, swap, sync, write_text
from .foreign import read_json
from .inference import pipeline_normal, serving
from .sampling import sample
from .serve import open_export
from .show import tell
from .sidecar import SIDECAR, Serving, read_export
from .workflow import NAME as WORKFLOW
from .workflow import workflow

GALLERY = "gallery"  # folder of pictures beside the card
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}  # by the base's dtype; of what, `distance` says


class ExportMismatch(RuntimeError):
    """Written files that do not give the trainer's samples: a fault of ours, or of the installed diffusers or peft."""


def export_run(run: Path, formats: Sequence[str] | None = None, out: Path | None = None, step: int | None = None) -> Path:
    """Export a run as its checkpoint of a step has it (None: the newest); returns the folder (`out`, otherwise run/export, or
    run/export-<step>).

    Raises:
        UserError: no run, no checkpoint, a format that does not fit, or an `out` that holds something else.
        ExportMismatch: see `check_export`.
    """
    out = out or run / ("export" if step is None else f"export-{step}")
    tell(write_export(restore_run(run, step), out, formats, run))
    return out


def write_export(distillation: Distillation, out: Path, formats: Sequence[str] | None = None, run: Path | None = None) -> str:
    """Write the export beside `out`, check it, and only then put it in the place of an older one; returns the finding.

    Args:
        formats: of FORMATS; None: all LoRA files that the family has; the whole pipeline if the whole net was trained.
        run: whose figures and sample grid the card shows; None: the run folder that `out` lies in, if it does.

    Raises:
        UserError: a format that does not fit, or `out` holds something that is not an export.
        ExportMismatch: see `check_export`.
    """
    told = serving(distillation)
    told = dataclasses.replace(told, files=names(distillation, told, formats))
    ours = trainers_latents(distillation, told, first_noise(distillation, told))  # networks in shares need all processes
    plain = gathered(distillation, told)
    return distributed.at_first(lambda: write_whole(plain, told, ours, out, run or out.parent))


def gathered(distillation: Distillation, told: Serving) -> Distillation:
    """The same, but whole copies of students are networks of their own, on the CPU, where they were in shares."""
    if not distillation.together or distillation.recipe.lora is not None:
        return distillation
    from .sharding import unsharded

    students = {who: distillation.students()[who] for who in told.students}
    plain = {who: dataclasses.replace(role, net=unsharded(role.net)) for who, role in students.items()}
    averages = {who + AVERAGE: role for who, role in plain.items() if who + AVERAGE in distillation.roles}
    return dataclasses.replace(distillation, roles=distillation.roles.swap(**plain, **averages))


def write_whole(distillation: Distillation, told: Serving, ours: Tensor, out: Path, run: Path) -> str:
    """What `write_export` does in one process. ours: the trainer's own latents of `first_noise`, [B, ...]."""
    if out.exists() and not (out / SIDECAR).is_file() and (out.is_file() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an export; give a new folder with --out")
    tmp = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    recover(out)
    try:
        with naming(out):
            finding = write_files(distillation, told, ours, tmp, run)
            swap(tmp, out)
    finally:
        recover(out)
        shutil.rmtree(tmp, ignore_errors=True)
    return finding


def write_files(distillation: Distillation, told: Serving, ours: Tensor, out: Path, run: Path) -> str:
    """Write all that an export has into a new folder, check it, and wait until it is on the disk; returns the finding."""
    out.mkdir(parents=True)
    for form, files in told.files.items():
        for part, file in zip(told.worn, files, strict=False):  # a whole pipeline has several parts
            WRITERS[form](distillation, told, part, out / file)
    told.build_scheduler().save_pretrained(out / "scheduler")
    (out / SIDECAR).write_text(told.to_json(), encoding="utf-8")
    if graph := workflow(told):
        (out / WORKFLOW).write_text(json.dumps(graph, indent=1), encoding="utf-8")
    draw_gallery(distillation, told, ours, out)
    write_card(out, run)
    finding = compare(distillation, ours, out)
    mode = (out / SIDECAR).stat().st_mode
    for file in out.rglob("*"):
        if file.is_file():
            file.chmod(mode)  # safetensors writes files that nobody else may read
        sync(file)
    return finding


def write_card(out: Path, run: Path | None = None) -> None:
    """(Re)write an export's README.md, with figures of run/eval and the newest grid of run/samples if run is a run."""
    results = []
    if run is not None and (run / "recipe.yaml").is_file():
        results = [result for file in sorted((run / "eval").glob("*.json")) if (result := figures_in(file)) is not None]
        if grid := newest_grid(run / "samples"):
            with beside(out / "samples.png") as tmp:
                shutil.copyfile(grid, tmp)
    picture = "samples.png" if (out / "samples.png").is_file() else None
    gallery = [f"{GALLERY}/{file.name}" for file in sorted((out / GALLERY).glob("*.png"))]
    write_text(out / "README.md", card(read_export(out), results, picture, gallery))


def figures_in(file: Path) -> Any:
    """A result file's value; None of one that cannot be read, which the report tells."""
    try:
        return read_json(file)
    except (OSError, ValueError):
        return None


@torch.no_grad()
def draw_gallery(distillation: Distillation, told: Serving, ours: Tensor, out: Path) -> None:
    """The student's pictures of `told.prompts`, decoded from latents [B, ...], as gallery/1.png, ...; of videos none."""
    if told.frames is not None:
        return
    (out / GALLERY).mkdir()
    family = distillation.family
    latents = ours.to(device := family.pipe.device)
    with placed([family.pipe.vae], device), tiled(family.pipe.vae, family.size):
        for k, latent in enumerate(latents, 1):
            Image.fromarray(to_pixels(family.decode(latent[None]))[0]).save(out / GALLERY / f"{k}.png")


def first_noise(distillation: Distillation, told: Serving) -> Tensor:
    """What sampling begins from, [B, ...], in the check and in the gallery."""
    shape = (len(told.prompts), *distillation.family.shape)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def check_export(distillation: Distillation, out: Path) -> str:
    """Load every file of an export into a fresh stock pipeline, and sample what the trainer samples; returns one line.

    Two prompts, the same initial noise, and the same noise at every step, compared as latents.

    Raises:
        ExportMismatch: their distance exceeds TOLERANCE.
    """
    told = read_export(out)
    return compare(distillation, trainers_latents(distillation, told, first_noise(distillation, told)), out)


@torch.no_grad()
def compare(distillation: Distillation, ours: Tensor, out: Path) -> str:
    """`check_export` against what the trainer made of that noise, [B, ...]."""
    told, worst, trusted = read_export(out), 0.0, distillation.recipe.trust_remote_code
    family = distillation.family
    noise = first_noise(distillation, told)
    for form, files in told.files.items():
        theirs = family.unpacked(stock_latents(open_export(out, told, form, trusted), told, family.packed(noise)))
        off = distance(theirs, ours, told.dtype)
        if not off <= TOLERANCE[told.dtype]:
            why = "; ".join(differences(distillation, told, out)) or "the files hold what they should"
            raise ExportMismatch(
                f"{out / ' and '.join(files)} in a stock {told.pipeline} does not give the trainer's samples: latents differ "
                f"by {off:.2g}, allowed is {TOLERANCE[told.dtype]:g}. {why}. Versions: {told.versions}"
            )
        worst = max(worst, off)
    unit = "" if told.dtype == "float32" else f" of their size ({told.dtype})"
    written = " and ".join(file for files in told.files.values() for file in files)
    return f"checked: {written}, in stock diffusers: the trainer's latents to {worst:.1e}{unit}"


def distance(theirs: Tensor, ours: Tensor, dtype: str) -> float:
    """The largest difference, relative to the largest latent if that is above 1; in half precision, where stock schedulers
    round every step, root mean squares instead: of the difference, relative to that of the latents (of tiny networks 0.008 in
    bfloat16, 0.001 in float16)."""
    off = theirs - ours
    if dtype == "float32":
        return (off.abs().max() / ours.abs().max().clamp(min=1)).item()
    return (off.square().mean().sqrt() / ours.square().mean().sqrt()).item()


SEED = 1  # of the noise between steps


def trainers_latents(distillation: Distillation, told: Serving, noise: Tensor) -> Tensor:
    """What the student makes of noise [B, ...], with the draws that `stock_latents` meets."""
    roles, family = distillation.students(), distillation.family
    plain = {student: dataclasses.replace(roles[student], precision=None) for student in told.students}
    roles = roles.swap(**plain)  # a stock pipeline has no autocast
    device, dtype = family.pipe.device, getattr(torch, told.dtype)
    how = distillation.inference()
    draw = pipeline_normal(family, dtype, torch.Generator().manual_seed(SEED), how)
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        cond = family.encode_prompts(list(told.prompts))
        return sample(roles, how, noise.to(device, dtype).float(), cond, draw).cpu().float()


def stock_latents(pipe: diffusers.DiffusionPipeline, told: Serving, noise: Tensor) -> Tensor:
    """What a stock pipeline makes of noise [B, ...], both as it packs them."""
    pipe.set_progress_bar_config(disable=True)
    with torch.random.fork_rng(), quiet():
        torch.manual_seed(SEED)
        latents, generator = noise.to(pipe.device, getattr(torch, told.dtype)), torch.Generator().manual_seed(SEED)
        options = {"latents": latents, "generator": generator, "output_type": "latent", "return_dict": False}
        return pipe(prompt=list(told.prompts), **options, **told.arguments)[0].cpu().float()


def differences(distillation: Distillation, told: Serving, out: Path) -> Iterator[str]:
    """What an export holds that it should not, in words."""
    wanted = serving(distillation).sampler.config
    written = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
    if keys := [key for key, value in wanted.items() if written.get(key) != value]:
        yield f"scheduler_config.json differs in {', '.join(keys)}"
    for part, file in zip(told.worn, told.files.get("diffusers", ()), strict=False):
        there, state = load_file(out / file), lora_state(distillation, part)
        off = [key for key in state if key not in there or not there[key].equal(state[key])] + [*(there.keys() - state)]
        if off:
            yield f"{len(off)} of {len(state)} tensors of {file} differ, the first is {off[0]}"
