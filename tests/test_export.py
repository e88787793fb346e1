"""Exports are loaded by plain diffusers in another process, and must give there what the student gives here."""

import dataclasses
import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import LCMScheduler
from safetensors.torch import load_file, save_file
from students import CASES, PROMPTS, noise, student

from stepdistill import checkpoint, export, serve
from stepdistill.errors import UserError
from stepdistill.export import ExportMismatch, check_export, export_run, trainers_latents, write_export
from stepdistill.sampling import sample
from stepdistill.serve import load_pipeline, sample_run
from stepdistill.sidecar import read_export

PLAIN = """
import json, os, pathlib, re, sys
sys.modules["stepdistill"] = None  # importing it raises ImportError
import torch, diffusers
diffusers.utils.logging.disable_progress_bar()
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    os.chdir(folder)
    job = json.loads(pathlib.Path("job.json").read_text())
    noise = torch.load("noise.pt")

    card = {}
    exec(re.search("```python\\n(.*?)```", pathlib.Path("README.md").read_text(), re.S)[1], card)
    if job["wrapped"]:
        pipe, call = card["pipe"], job["call"] | {"callback_on_step_end": card.get("take_turns")}
    else:
        pipe, call = diffusers.DiffusionPipeline.from_pretrained(job["model"], dtype=torch.float32), job["call"]
        if job["lora"]: pipe.load_lora_weights(".")
        pipe.scheduler = getattr(diffusers, job["scheduler"]).from_pretrained("scheduler")
    pipe.set_progress_bar_config(disable=True)
    generator = torch.manual_seed(1)
    made = pipe(job["prompts"], latents=noise, generator=generator, output_type="latent", return_dict=False, **call)[0]
    torch.save(made, "latents.pt")
"""


@pytest.fixture(scope="module")
def plain(made, tmp_path_factory):
    """Case -> a copy of its export in which plain diffusers has worked: latents.pt, picture.png or video.webp."""
    place = tmp_path_factory.mktemp("elsewhere")
    for case in CASES:
        _, out = made[case]
        told = read_export(out)
        shutil.copytree(out, place / case)
        job = {
            "model": told.base if told.lora else "pipeline",
            "lora": bool(told.lora),
            "wrapped": len(told.worn) > 1
            or told.sampler.told is not None
            or told.loras != ()
            or (told.lora or {}).get("loader") == "peft",
            "scheduler": told.sampler.scheduler,
            "prompts": PROMPTS,
            "call": told.arguments,
        }
        (place / case / "job.json").write_text(json.dumps(job))
        torch.save(made[case][0].family.packed(noise(made[case][0])), place / case / "noise.pt")
    script = place.with_name("plain.py")
    script.write_text(PLAIN)
    done = subprocess.run([sys.executable, "-I", script, place], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {case: place / case for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_plain_diffusers_gives_the_trainers_samples(made, plain, case):
    distillation, out = made[case]
    ours = trainers_latents(distillation, read_export(out), noise(distillation))
    theirs = torch.load(plain[case] / "latents.pt").reshape(ours.shape)  # FLUX packs them
    assert (theirs - ours).abs().max() <= 1e-4 * ours.abs().max().clamp(min=1)  # PixArt's are hundreds
    if "told" not in case:  # the teacher has no such input
        same = distillation.roles.swap(**{who: distillation.roles.teacher for who in distillation.roles if "student" in who})
        teacher = trainers_latents(dataclasses.replace(distillation, roles=same), read_export(out), noise(distillation))
        assert (theirs - teacher).abs().max() > 1e-2  # so a lost LoRA would show


@pytest.mark.parametrize("case", CASES)
def test_the_cards_snippet_draws_what_sample_draws(made, plain, case, tmp_path):
    name = "video.webp" if "wan" in case else "picture.png"
    drawn = sample_run(made[case][1], PROMPTS[0], out=tmp_path / name)
    assert drawn.read_bytes() == (plain[case] / name).read_bytes()


def test_the_trainers_side_of_the_check_is_sample(made):
    """With noise of the test's own, not that of `trainers_latents`."""
    distillation, out = made["ddim-eps"]
    cond = distillation.family.encode_prompts(PROMPTS)
    plainly = sample(distillation.students(), distillation.inference(), noise(distillation), cond)
    assert torch.equal(plainly, trainers_latents(distillation, read_export(out), noise(distillation)))


@pytest.mark.parametrize("case", ["boot-eps", "boot-flux", "boot-sdxl-whole"])
def test_a_student_that_does_not_hear_its_time_is_found_out(made, case, monkeypatch):
    monkeypatch.setattr(serve, "tell", lambda _net, _time: None)
    with pytest.raises(ExportMismatch):
        check_export(*made[case])


def test_a_fused_folder_is_told_its_time_too(made, tmp_path):
    assert "checked: fused, in stock diffusers" in write_export(made["boot-eps"][0], tmp_path / "e", ("fused",))


def test_a_pipeline_that_knows_no_loras_is_fused(made, tmp_path):
    distillation = made["dmd2-pixart"][0]
    write_export(distillation, tmp_path / "e", ("fused",))
    names = load_file(tmp_path / "e/fused/transformer/diffusion_pytorch_model.safetensors").keys()
    assert (
        names == distillation.family.pipe.transformer.__class__.from_config(distillation.family.net.config).state_dict().keys()
    )


@pytest.mark.parametrize("case", ["lcm-eps", "lcm-flow"])
def test_other_numbers_of_steps(made, case):
    distillation, out = made[case]
    pipe, cond = load_pipeline(out, 2), distillation.family.encode_prompts(PROMPTS)
    for n in (2, 1, 4, 8):
        told, generator = read_export(out).at(n), torch.Generator().manual_seed(export.SEED)
        if n != 2:  # that one came with the pipeline
            pipe.scheduler = told.build_scheduler()
        theirs = export.stock_latents(pipe, told, noise(distillation))
        how, draw = distillation.inference(n), functools.partial(like, generator=generator)
        assert (theirs - sample(distillation.students(), how, noise(distillation), cond, draw)).abs().max() <= 1e-4


def like(x, generator):
    return torch.randn(x.shape, generator=generator)


def test_a_whole_pipeline_leaves_the_teachers_alone(made):
    distillation, out = made["lcm-told-guidance"]
    assert {p.name for p in out.iterdir()} == {"README.md", "gallery", "pipeline", "scheduler", "stepdistill.json"}
    assert not list(out.rglob("*.bin"))
    assert distillation.family.pipe.unet.config.time_cond_proj_dim is None
    assert not isinstance(distillation.family.pipe.scheduler, LCMScheduler)
    assert json.loads((out / "pipeline/unet/config.json").read_text())["time_cond_proj_dim"] == 256


def test_restored_from_a_checkpoint(made, tmp_path, capsys):
    distillation, out = made["lcm-eps"]
    checkpoint.save(out.parent / "checkpoints", 1, distillation.tensors(), {}, keep=1)
    assert export_run(out.parent, ("diffusers",), tmp_path / "again") == tmp_path / "again"
    with pytest.raises(UserError, match="has no checkpoint of step 77; it has"):
        export_run(out.parent, step=77)
    assert capsys.readouterr().out.startswith("checked: pytorch_lora_weights.safetensors, in stock diffusers")
    again, before = (load_file(place / "pytorch_lora_weights.safetensors") for place in (tmp_path / "again", out))
    assert all(torch.equal(again[key], before[key]) for key in before)


def test_an_earlier_checkpoint_is_exported_beside_the_newest(monkeypatch, tmp_path):
    monkeypatch.setattr(export, "restore_run", lambda run, step: step)
    written = {}
    monkeypatch.setattr(export, "write_export", lambda step, out, *_: written.update({step: out}))
    assert [export_run(tmp_path, step=step) for step in (None, 20)] == [tmp_path / "export", tmp_path / "export-20"]
    assert written == {None: tmp_path / "export", 20: tmp_path / "export-20"}


def spoil_a_tensor(out):
    state = load_file(out / FILE)
    key = next(key for key in state if "lora_B" in key)
    save_file(state | {key: -state[key]}, out / FILE)


def lose_a_module(out):
    state = load_file(out / FILE)
    module = next(iter(state)).split(".lora_")[0]
    save_file({key: x for key, x in state.items() if not key.startswith(module + ".lora_")}, out / FILE)


def another_scheduler(out):
    file = out / "scheduler" / "scheduler_config.json"
    file.write_text(file.read_text().replace('"original_inference_steps": 1000', '"original_inference_steps": 50'))


def another_kohya_alpha(out):
    state = load_file(out / "tiny_kohya.safetensors")
    save_file({k: x / 2 if k.endswith("alpha") else x for k, x in state.items()}, out / "tiny_kohya.safetensors")


FILE = "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (spoil_a_tensor, "latents differ by .* 1 of .* tensors of pytorch_lora_weights.safetensors differ, the first is unet"),
        (lose_a_module, "2 of .* tensors of pytorch_lora_weights.safetensors differ"),
        (another_scheduler, "scheduler_config.json differs in original_inference_steps"),
        (another_kohya_alpha, "tiny_kohya.safetensors in a stock .* the files hold what they should"),
    ],
)
def test_a_spoilt_export_fails_its_check(copied, spoil, told):
    spoil(copied[1])
    with pytest.raises(ExportMismatch, match=told):
        check_export(*copied)


def test_an_export_that_fails_its_check_changes_nothing(copied, monkeypatch):
    distillation, out = copied
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    monkeypatch.setitem(export.TOLERANCE, "float32", -1.0)
    with pytest.raises(ExportMismatch):
        write_export(distillation, out)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert list(out.parent.iterdir()) == [out]


def test_an_older_export_is_replaced(copied):
    distillation, out = copied
    write_export(distillation, out, ("diffusers",))
    assert not (out / "tiny_kohya.safetensors").exists()
    assert list(out.parent.iterdir()) == [out]
    assert len({file.stat().st_mode for file in out.rglob("*") if file.is_file()}) == 1


def test_an_older_export_survives_an_interrupt(copied, monkeypatch):
    distillation, out = copied
    before = (out / "stepdistill.json").read_bytes()
    rename = Path.rename

    def interrupted(path, target):
        if path.name.endswith(".tmp"):
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_export(distillation, out, ("diffusers",))
    assert list(out.parent.iterdir()) == [out] and (out / "stepdistill.json").read_bytes() == before
    assert (out / "tiny_kohya.safetensors").exists()


@pytest.mark.parametrize(
    ("case", "formats", "told"),
    [
        ("lcm-flow", ("kohya",), "StableDiffusion3Pipeline has no kohya file; choose from diffusers, fused"),
        ("lcm-eps", ("gguf",), "there is no such format; choose from diffusers, kohya, fused"),
        ("boot-eps", ("kohya",), "another time than its sampler's; choose from diffusers, fused"),
        ("dmd2-flow-whole", ("kohya",), "needs a LoRA, but lora is null"),
        ("dmd2-flow-whole", ("diffusers", "fused"), "format fused needs a LoRA"),
    ],
)
def test_formats_that_do_not_fit(made, case, formats, told, tmp_path):
    with pytest.raises(UserError, match=told):
        write_export(made[case][0], tmp_path / "e", formats)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_somebody_elses_is_not_touched(made, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="exists and is not an export"):
        write_export(made["lcm-eps"][0], tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("teacher", ["eps", "flow"])
@pytest.mark.long
def test_half_precision(tmp_path, teacher, dtype):
    strategy = "{name: dmd2, renoise: true}"
    distillation = student(tmp_path, teacher, f"model.dtype={dtype}", strategy=strategy)
    assert f"of their size ({dtype})" in write_export(distillation, tmp_path / "e", ("diffusers",))
    state = load_file(tmp_path / "e" / FILE)
    assert {x.dtype for x in state.values()} == {torch.float32}
    save_file({key: torch.zeros_like(x) for key, x in state.items()}, tmp_path / "e" / FILE)
    if teacher == "eps":  # what noise adds to this flow net is below half precision
        with pytest.raises(ExportMismatch):
            check_export(distillation, tmp_path / "e")
