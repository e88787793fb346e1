"""The model card of an export."""

import dataclasses
import json
import re

import torch
import yaml
from loras import deltas, save, style
from PIL import Image
from students import noise, student

from stepdistill.card import card
from stepdistill.card_notes import combining, quoted
from stepdistill.export import lora_state, stock_latents, write_card
from stepdistill.families.load import load_pipeline_folder, quiet
from stepdistill.inference import serving
from stepdistill.sidecar import read_export


def test_the_card(made, tmp_path):
    flow, eps = (read_export(made[case][1]) for case in ("dmd2-flow-renoising", "lcm-eps"))
    text = (made["lcm-eps"][1] / "README.md").read_text()
    assert text.startswith('---\nlibrary_name: "diffusers"')
    assert "Negative prompts have no effect" in text and "ComfyUI" in text
    assert "torch.manual_seed" in card(flow).split("```")[2] and "reproducible only" not in text
    assert "base_model" not in text.split("---")[1]  # a folder is none
    assert "| 2 | saved, with shift" in card(read_export(made["lcm-flow"][1]))
    assert "scale 1 is what was trained" in card(eps)


def test_the_card_of_a_student_that_is_told_another_time(made):
    text = (made["boot-eps"][1] / "README.md").read_text()
    assert "No stock scheduler tells a network another time than its own" in text and "ComfyUI and A1111 cannot" in text
    assert "pipe.unet.register_forward_pre_hook(hear, with_kwargs=True)" in text
    assert "register_forward" not in (made["lcm-eps"][1] / "README.md").read_text()


def test_the_card_shows_figures_and_the_newest_grid(copied, tmp_path):
    _, out = copied
    run = tmp_path
    (run / "recipe.yaml").write_text("")
    for name in ("eval", "samples"):
        (run / name).mkdir()
    rows = [
        {"who": "teacher", "steps": 25, "solver": "UniPC", "guidance": 2.0, "n": 8, "fd": 2.5},
        {"who": "teacher", "steps": 25, "solver": "DDIM", "guidance": 2.0, "n": 8, "fd": 9.75},
        {"who": "student", "steps": 4, "solver": "", "guidance": 1.0, "n": 8, "fd": 3.14159, "alignment": None},
    ]
    compared = {"preset": "tiny", "n": 2048}
    (run / "eval" / "tiny.json").write_text(json.dumps({"rows": rows, "provenance": {"compared": compared}}))
    other = [{"who": "student", "steps": 4, "guidance": 1.0, "n": 8, "fd": 2.9}]
    (run / "eval" / "mine.json").write_text(json.dumps({"rows": other, "provenance": {"compared": {"preset": "mine", "n": 8}}}))
    for step in ("000300", "000100"):
        (run / "samples" / f"{step}.png").write_bytes(step.encode())
    write_card(out, run)
    text = (out / "README.md").read_text()
    assert "| student | 4 | 1 |  | 8 | 3.142 |" in text and "| teacher | 25 | 2 | UniPC | 8 | 2.5 |" in text
    assert "9.75" not in text  # only the best solver
    assert "| student | 4 | 1 | 8 | 2.9 |" in text  # of another protocol, so not beside 3.142
    assert "preset `mine` of stepdistill on 8 pictures" in text and "preset `tiny` of stepdistill on 2,048" in text
    assert "](samples.png)" in text and (out / "samples.png").read_bytes() == b"000300"


def test_the_gallery(made):
    """What the Hub reads names pictures that lie there, and the prompts that they were drawn of."""
    _, out = made["lcm-eps"]
    text, told = (out / "README.md").read_text(), read_export(out)
    shown = yaml.safe_load(text.split("---")[1])["widget"]
    assert [entry["text"] for entry in shown] == list(told.prompts) and "\n<Gallery />\n" in text
    pictures = [Image.open(out / entry["output"]["url"]) for entry in shown]
    assert all(picture.size == told.size[::-1] for picture in pictures)
    assert pictures[0].tobytes() != pictures[1].tobytes()


def test_whatever_a_prompt_or_a_path_says_stays_text(made):
    told = read_export(made["lcm-eps"][1])
    nasty = 'a "b": {c} ```\n---\n# d | `e` ---'
    changed = dataclasses.replace(told, prompts=(nasty, nasty), model="org/a`b|c")
    text = card(changed, [{"fd": 1.0, "who": "a|b"}], gallery=["gallery/1.png"])
    front = next(yaml.safe_load_all(text))
    assert front["widget"] == [{"text": nasty, "output": {"url": "gallery/1.png"}}]
    assert (front["base_model"], front["license"]) == ("org/a`b|c", "other")
    code = re.findall("^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(code) == 2
    compile(code[0], "card", "exec")
    assert "`` org/a`b|c ``" in text and "| a\\|b |" in text


def test_code_in_markdown():
    assert quoted("a") == "`a`" and quoted("a`b") == "`` a`b ``" and quoted("``") == "``` `` ```"


def test_the_student_beside_a_style_is_the_sum_of_both(tmp_path, monkeypatch):
    """The card's own lines, on a stock pipeline: base plus the student plus 0.7 of the style, in every layer."""
    monkeypatch.chdir(tmp_path)
    distillation = student(tmp_path, "eps")
    told = dataclasses.replace(serving(distillation), files={"diffusers": ("pytorch_lora_weights.safetensors",)})
    ours = lora_state(distillation, told.worn[0])
    save(ours, tmp_path / "pytorch_lora_weights.safetensors")
    theirs = style(distillation.family.net, layers=("attn1.to_q.base_layer", "conv2.base_layer"))
    theirs = {key.replace(".base_layer", ""): x for key, x in theirs.items()}
    save(theirs, tmp_path / "style.safetensors")
    pipe, by_hand = (load_pipeline_folder(told.model) for _ in range(2))
    with quiet():
        exec(re.search("```python\n(.*?)```", combining(told), re.DOTALL)[1], {"pipe": pipe, "here": "."})
        pipe.scheduler = by_hand.scheduler = told.build_scheduler()
    for scale, state in ((1.0, ours), (0.7, theirs)):
        for name, delta in deltas(state).items():
            weight = by_hand.unet.get_submodule(name.removeprefix("unet.")).weight
            weight.data += scale * delta.reshape(weight.shape)
    both, summed = (stock_latents(each, told, noise(distillation)) for each in (pipe, by_hand))
    torch.testing.assert_close(both, summed, rtol=1e-4, atol=1e-4)
    pipe.set_adapters("few_step")
    assert (stock_latents(pipe, told, noise(distillation)) - summed).abs().max() > 0.01  # the style is heard
