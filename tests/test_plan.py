"""Plans: what is foreseen without memory is what a real iteration needs."""

import copy
import shutil
from pathlib import Path

import diffusers
import pipelines
import pytest
import torch

from stepdistill.assemble import Distillation
from stepdistill.batch import Batch
from stepdistill.errors import UserError
from stepdistill.families import FAMILIES
from stepdistill.families.load import load_family
from stepdistill.live_bytes import LiveBytes
from stepdistill.plan import make_plan, open_costs, plan_of
from stepdistill.plan_report import read_size, report
from stepdistill.plan_trial import Even
from stepdistill.recipe import load_recipe
from stepdistill.roles import build_roles
from stepdistill.sources import TINY
from stepdistill.trainer import Trainer

RECIPES = Path(__file__).parents[1] / "recipes"
MASKED = ("qwen_image", "z_image", "lumina2", "pixart", "sana", "ltx", "hunyuanvideo")
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


@pytest.mark.parametrize("model", ["tiny-sd", "tiny-sd3"])
def test_embedded_models_and_folders_are_planned_alike(model, tmp_path):
    small = ("data.count=8", "eval.batch=1", f"model.source=stepdistill/{model}")
    plan = make_plan(recipe_of(tmp_path, *small))
    folder = make_plan(recipe_of(tmp_path, *small[:2], f"model.source={TINY / model}"))
    assert folder.phases == plan.phases and folder.flops == plan.flops
    net = load_family(f"stepdistill/{model}").net
    assert plan.parameters == sum(p.numel() for p in net.parameters())


def test_a_folder_without_its_configs_is_refused(tmp_path):
    folder = shutil.copytree(TINY / "tiny-sd", tmp_path / "model")
    recipe = recipe_of(tmp_path, f"model.source={folder}")
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(UserError, match="its configs cannot be read"):
        make_plan(recipe)


def test_a_discriminator_and_what_it_reads_are_counted(tmp_path):
    small = ("model.source=stepdistill/tiny-sd3", "data.images=stepdistill/tiny", "eval.batch=1", "data.count=8")
    plain = make_plan(recipe_of(tmp_path, *small))
    gan = make_plan(recipe_of(tmp_path, *small, "strategy.gan=5e-3"))
    assert plain.heads == 0 < gan.heads
    assert gan.phases["critic's step"] > plain.phases["critic's step"]
    assert gan.evaluations["fake", "backward"] == plain.evaluations["fake", "backward"] + 5  # two a sample, and the student's


@pytest.mark.parametrize("pipeline", MASKED)
def test_a_masked_text_counts_whole(pipeline, tmp_path):
    def flops(length):
        pipe = getattr(pipelines, pipeline)()
        prompt = {name: tuple(x.shape[1:]) for name, x in FAMILIES[type(pipe).__name__](pipe).encode_prompts(["a"]).items()}
        prompt = {name: (length, *shape[1:]) if name in ("text", "mask") else shape for name, shape in prompt.items()}
        for module in pipe.components.values():
            if isinstance(module, torch.nn.Module):
                module.to("meta")
        with LiveBytes() as live:
            family = FAMILIES[type(pipe).__name__](pipe)
            costs, _ = open_costs(recipe_of(tmp_path), family, prompt, live)
            return costs(1, False).flops

    assert flops(32) < flops(64) < flops(96)


def test_choices_are_even_in_every_cadence():
    for every in range(1, 11):
        for n in (2, 4, 8):
            means = [Even(0, step, [0]).choice(n) for step in range(0, 60, every)]
            assert sum(means) / len(means) == pytest.approx((n - 1) / 2, abs=0.1 * n)


def test_shapes_that_are_remembered_are_those_that_are_computed():
    with LiveBytes() as live:
        whole, half = (
            torch.empty(2, 3, device="meta", dtype=torch.int64),
            torch.empty(2, 3, device="meta", dtype=torch.bfloat16),
        )
        for _ in range(2):
            assert (whole * 2).dtype == torch.int64 and (whole * 2.0).dtype == torch.float32 and (half * 2).dtype == half.dtype
            assert (half.t() + half.t()).stride() == half.t().stride() and (half + half).stride() == half.stride()
            before = live.flops
            assert (half @ half.t()).shape == (2, 2) and live.flops - before == 2 * 2 * 2 * 3


@pytest.mark.long
@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_has_a_plan(recipe, tmp_path):
    pictures = [] if "pictures/" not in recipe.read_text() else ["data.images=stepdistill/tiny"]
    plan = make_plan(load_recipe(recipe, pictures))
    assert plan.peak > 1e9 and plan.flops and all(size > 0 for size in plan.phases.values())
    assert max(map(len, report(plan, 1e9).splitlines())) <= 80


def test_an_unknown_model_is_refused_before_work(tmp_path):
    with pytest.raises(UserError, match="architecture is not known"):
        make_plan(recipe_of(tmp_path, "model.source=somebody/something"))
