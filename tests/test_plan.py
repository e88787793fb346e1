"""Plans: what is foreseen without memory is what a real iteration needs."""

import copy

import diffusers
import pipelines
import pytest
import torch

from stepdistill.assemble import Distillation
from stepdistill.batch import Batch
from stepdistill.errors import UserError
from stepdistill.families import FAMILIES
from stepdistill.live_bytes import LiveBytes
from stepdistill.plan import make_plan, plan_of
from stepdistill.plan_report import read_size, report
from stepdistill.recipe import load_recipe
from stepdistill.roles import build_roles
from stepdistill.trainer import Trainer

RECIPE = """
name: planned
model: {source: stepdistill/tiny-sd}
lora: {rank: 16}
strategy: {name: dmd2, steps: 2, guidance: 3.0, student_every: 2}
data: {prompts: stepdistill/tiny}
train: {steps: 4, batch: 2, accumulate: 2}
eval: {batch: 1}
"""


def unet(width=64):
    pipe, text = pipelines.sdxl(), 32
    return pipe, diffusers.UNet2DConditionModel(
        sample_size=32, block_out_channels=(width, 4 * width, 8 * width), layers_per_block=1, cross_attention_dim=text,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(2, 4, 8),
        transformer_layers_per_block=(1, 1, 2), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 16,
    )  # fmt: skip


def mmdit(layers=4):
    return pipelines.sd3(with_t5=True), diffusers.SD3Transformer2DModel(
        sample_size=32, num_layers=layers, num_attention_heads=10, attention_head_dim=64, caption_projection_dim=640,
        in_channels=4, out_channels=4, joint_attention_dim=32, pooled_projection_dim=32, qk_norm="rms_norm",
    )  # fmt: skip


def flux(layers=4):
    return pipelines.flux(), diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=layers, num_single_layers=2 * layers, attention_head_dim=64,
        num_attention_heads=8, joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(8, 28, 28),
        guidance_embeds=True,
    )  # fmt: skip


def family_of(pipe, net):
    """The pipeline's family with another network of the same kind, for pictures that give it 256 tokens or more."""
    family = FAMILIES[type(pipe).__name__](pipe)
    for module in (pipe.vae, net):
        module.eval().requires_grad_(False)
    pipe.register_modules(**{family.net_name: net})
    return FAMILIES[type(pipe).__name__](pipe, (64, 64))


def real_peak(recipe, pipe, net) -> int:
    """The most bytes that live in two real iterations on the CPU, with the weights."""
    recipe = copy.deepcopy(recipe)
    family = family_of(pipe, net)
    with LiveBytes("cpu") as live:
        roles = build_roles(family, recipe.strategy.roles, recipe.lora.rank)
        live.hold(net.parameters())
        cond, null = family.encode_prompts(["a red cat"]), family.null_prompts()

        class Data:
            device = "cpu"

            def __call__(self, step, part):
                return Batch(torch.randn(1, *family.shape), cond, null), range(part, part + 1)

        trainer = Trainer(Distillation(recipe, family, recipe.strategy, roles), Data())
        live.lap()
        trainer.step()  # makes the optimizers' state
        trainer.step()
        trainer.step()
        return live.lap()


def foreseen(recipe, pipe, net):
    """The plan of the same, on the meta device."""
    prompt = {name: tuple(x.shape[1:]) for name, x in family_of(pipe, net).encode_prompts(["a red cat"]).items()}
    with LiveBytes() as live:
        family = family_of(pipe, copy.deepcopy(net).to("meta"))
        pipe.vae.to("meta")
        return plan_of(recipe, family, prompt, live)


def recipe_of(tmp_path, *overrides):
    file = tmp_path / "planned.yaml"
    file.write_text(RECIPE)
    return load_recipe(file, overrides)


@pytest.mark.long
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("network", [unet, mmdit, flux])
def test_the_peak_is_that_of_a_real_iteration(network, checkpointing, tmp_path):
    guidance = "strategy.guidance=1" if network is flux else "strategy.guidance=3"
    recipe = recipe_of(tmp_path, f"train.checkpointing={checkpointing}".lower(), guidance)
    torch.manual_seed(0)
    pipe, net = network()
    assert sum(p.numel() for p in net.parameters()) > 50e6
    plan = foreseen(recipe, pipe, net)
    pipe, _ = network()
    real = real_peak(recipe, pipe, net)
    told = max(size for phase, size in plan.phases.items() if phase.endswith("step"))
    assert told == pytest.approx(real, rel=0.15), (told / 1e6, real / 1e6)


def test_a_plan_of_tiny_networks_counts_roles_steps_and_bytes(tmp_path):
    recipe = recipe_of(tmp_path)
    plan = foreseen(recipe, *mmdit_of_one_layer())
    assert plan.roles == ("student", "fake")
    assert plan.adapters == 2 * 4 * plan.size == plan.gradients == plan.optimizer // 2
    assert {who: plan.evaluations.get((who, "backward"), 0) for who in ("student", "fake", "teacher")} == {
        "student": 1,  # two samples, every second iteration
        "fake": 2,
        "teacher": 0,
    }
    assert plan.evaluations["teacher", "forward"] == 2  # guided: two rows for each of two samples, every second iteration
    assert plan.evaluations["fake", "forward"] == 3  # two of its own, and one for the student, on average
    assert set(plan.phases) == {"encoding", "student's step", "critic's step", "validation"}
    text = report(plan, read_size("24GB"))
    assert max(map(len, text.splitlines())) <= 80
    assert "it fits" in text and "does NOT fit" in report(plan, 1e6)


def mmdit_of_one_layer():
    pipe = pipelines.sd3(with_t5=True)
    return pipe, pipe.transformer


def test_sizes_of_cards():
    assert read_size("24GB") == read_size(" 24 GiB") == read_size("24") == 24 * 2**30
    for wrong in ("", "big", "0GB", "24TB"):
        with pytest.raises(UserError, match="--gpu"):
            read_size(wrong)


def test_an_unknown_model_is_refused_before_work(tmp_path):
    with pytest.raises(UserError, match="architecture is not known"):
        make_plan(recipe_of(tmp_path, "model.source=somebody/something"))
