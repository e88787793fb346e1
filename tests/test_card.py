"""The model card of an export."""

import json

from stepdistill.card import card
from stepdistill.export import write_card
from stepdistill.inference import read_export


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
    (run / "eval" / "table.json").write_text(json.dumps({"rows": rows, "provenance": {"seed": 1}}))
    for step in ("000300", "000100"):
        (run / "samples" / f"{step}.png").write_bytes(step.encode())
    write_card(out, run)
    text = (out / "README.md").read_text()
    assert "| student | 4 | 1 |  | 8 | 3.142 |" in text and "| teacher | 25 | 2 | UniPC | 8 | 2.5 |" in text
    assert "9.75" not in text  # only the best solver
    assert "](samples.png)" in text and (out / "samples.png").read_bytes() == b"000300"
