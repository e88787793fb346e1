"""Wan 2.1, Wan 2.2 with its two experts, and its single network with times for each token, against the stock pipeline."""

from dataclasses import replace

import pipelines
import pytest
import torch
from parts import inert
from PIL import Image
from pipelines import PROMPTS, watch
from safetensors.torch import load_file, save_file
from students import student
from torch import nn

from stepdistill import distributed
from stepdistill.data import build_batches
from stepdistill.errors import UserError
from stepdistill.evaluate.grid import CELL, HEAD, Samples
from stepdistill.evaluate.walks import strip, student_walk
from stepdistill.export import ExportMismatch, check_export, write_export
from stepdistill.families import FAMILIES, Wan
from stepdistill.families.load import check_size
from stepdistill.families.wan import Experts
from stepdistill.inference import serving, wearers
from stepdistill.lora_sources import NAME
from stepdistill.roles import Denoiser, build_roles, enable_checkpointing
from stepdistill.sampling import Inference
from stepdistill.schedules import RectifiedFlow
from stepdistill.serve import sample_run
from stepdistill.show import Line
from stepdistill.sidecar import read_export

VARIANTS = {"one": {}, "experts": {"boundary_ratio": 0.875}, "token_times": {"expand_timesteps": True}}
HOW = {"height": 32, "width": 32, "num_frames": 5}
X = torch.randn(4, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
HIGH, LOW = torch.full([4], 0.95), torch.full([4], 0.5)
BOTH = torch.tensor([0.3, 0.95, 0.87, 0.875])  # of which the last is the boundary


def make(**variant):
    family = FAMILIES["WanPipeline"](pipelines.wan(**variant))
    family.frames = 5
    return family


@pytest.fixture(scope="module", params=VARIANTS)
def family(request):
    family = make(**VARIANTS[request.param])
    assert isinstance(family, Wan) and family.kind == "flow"
    return family


@pytest.fixture(scope="module")
def four():
    """A family with two experts, and what it is asked four prompts with."""
    family = make(**VARIANTS["experts"])
    return family, family.encode_prompts([*PROMPTS, ""])


def sides(family, seen):
    """Which of the two experts the pipeline asked at each step."""
    boundary = family.pipe.config.boundary_ratio
    return {boundary is None or k.item() >= 1000 * boundary for _, k, _ in seen}


@pytest.mark.parametrize("prompts", [PROMPTS, [""]], ids=["three", "unconditional"])
def test_forward_is_the_pipeline_s_prediction(family, prompts):
    cond = family.encode_prompts(prompts)
    _, seen = watch(family.pipe, prompts, guidance_scale=Wan.sampler_guidance, **HOW)
    for out, k, x in seen:
        assert x.shape[1:] == family.latent_shape(32, 32)
        got = family.forward(family.net, x, torch.full([len(x)], k.item() / 1000), cond)
        assert torch.allclose(got, out, rtol=0, atol=1e-5)
    assert sides(family, seen) == ({True, False} if isinstance(family.net, Experts) else {True})


def test_guided_is_the_pipeline_s_guidance(family):
    null = {name: x.expand(3, *x.shape[1:]) for name, x in family.null_prompts().items()}
    _, seen = watch(family.pipe, PROMPTS, guidance_scale=4.0, **HOW)
    assert len(seen) == 3
    for out, k, x in seen:
        t = torch.full([3], k.item() / 1000)
        p = Denoiser(family, family.net).guided(x, t, family.encode_prompts(PROMPTS), null, 4.0)
        assert torch.allclose(p.flow, out, rtol=0, atol=2e-5)


def test_each_sample_has_its_own_expert(four):
    family, cond = four
    experts = [family.pipe.transformer_2, family.pipe.transformer, family.pipe.transformer_2, family.pipe.transformer]
    together = family.forward(family.net, X, BOTH, cond)
    for i, expert in enumerate(experts):
        alone = expert(X[i : i + 1], BOTH[i : i + 1] * 1000, cond["text"][i : i + 1])[0]
        assert torch.allclose(together[i : i + 1], alone, rtol=0, atol=1e-5)
    others = family.forward(family.net, X, BOTH.flip(0), cond)
    assert ((others - together).abs().flatten(1).amax(1) > 1e-3).all()


@pytest.mark.parametrize(("t", "others"), [(HIGH, {False, True}), (LOW, {False, True}), (HIGH, {True})])
def test_in_shares_an_expert_runs_if_any_process_asks_for_it(four, monkeypatch, t, others):
    """others: the sides that some process asks for, False the low one."""
    family, cond = four
    plain, tokens = family.net(X, 1000 * t, cond["text"])
    ran, asked = [], []
    monkeypatch.setattr(distributed, "in_shares", lambda net: net is family.net)
    monkeypatch.setattr(distributed, "anyone", lambda flag: asked.append(flag) or (len(asked) == 1) in others)
    nets = family.net.transformer, family.net.transformer_2
    hooks = [net.register_forward_hook(lambda net, args, _: ran.append((net, len(args[0])))) for net in nets]
    family.net.requires_grad_(True)
    out, features = family.net(X, 1000 * t, cond["text"])
    mine = bool((t >= 0.875).all())
    assert asked == [mine, not mine]  # both, whatever this process needs
    assert ran == [(net, 4 if side == mine else 1) for net, side in zip(nets, (True, False), strict=True) if side in others]
    assert torch.equal(out, plain) and torch.equal(features, tokens)
    own, other = nets if mine else nets[::-1]
    for part in (out, features):  # backward goes as far into the other expert as into this one, and finds nothing there
        one, two = (
            torch.autograd.grad(part.sum(), list(n.parameters()), retain_graph=True, allow_unused=True) for n in (own, other)
        )
        assert any(g is not None and g.any() for g in one) and not any(g is not None and g.any() for g in two)
        assert [g is None for g in two] == ([g is None for g in one] if (not mine) in others else [True] * len(two))
    family.net.requires_grad_(False)
    for hook in hooks:
        hook.remove()


def test_decode_and_encode_are_the_pipeline_s():
    family = make()
    latents, _ = watch(family.pipe, PROMPTS[:1], **HOW)
    pixels, _ = watch(family.pipe, PROMPTS[:1], output_type="pt", **HOW)  # [B, frames, 3, H, W]
    decoded = family.decode(latents.requires_grad_())
    assert decoded.shape == (1, 3, 5, 32, 32)
    assert torch.allclose((decoded / 2 + 0.5).clamp(0, 1).transpose(1, 2), pixels, rtol=0, atol=1e-5)
    decoded.sum().backward()
    assert latents.grad.abs().sum() > 0
    picture = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(family.encode(picture), family.encode(picture[:, :, None]))


def test_encode_undoes_decode_in_scale(monkeypatch):
    """With an autoencoder that does nothing."""
    family = make()
    inert(family.pipe.vae, monkeypatch)
    assert torch.allclose(family.decode(family.encode(X)), X, rtol=0, atol=1e-5)
    assert (family.encode(X) - X).abs().max() > 0.1


def test_shapes_and_schedule():
    family = Wan(pipelines.wan(flow_shift=5.0))
    assert family.latent_shape(480, 832) == (16, 21, 60, 104)  # 81 frames, the pipeline's own size
    assert family.schedule == RectifiedFlow(shift=5.0) and family.native == (480, 832)


@pytest.mark.parametrize("t", [HIGH, LOW, BOTH], ids=["high", "low", "both"])
def test_features_are_tokens_of_each_sample(four, t):
    family, cond = four
    role = Denoiser(family, family.net)
    p, tokens = role.features(X, t, cond)
    assert tokens.shape == (4, 8, role.width) == (4, 8, 24)  # 2 x 4 x 4 in patches of 1 x 2 x 2
    assert torch.equal(p.x0, role(X, t, cond).x0)
    for i in range(4):
        _, alone = role.features(X[i : i + 1], t[i : i + 1], {"text": cond["text"][i : i + 1]})
        assert torch.allclose(tokens[i : i + 1], alone, rtol=0, atol=1e-5)


def test_features_of_one_network():
    family = make()
    _, tokens = Denoiser(family, family.net).features(X, BOTH, family.encode_prompts([*PROMPTS, ""]))
    assert tokens.shape == (4, 8, 24)


def adapted(checkpointed=False):
    """A family with two experts, an open student and a fake score that are not the teacher, and four prompts."""
    family = make(**VARIANTS["experts"])
    cond = family.encode_prompts([*PROMPTS, ""])
    before = family.forward(family.net, X, BOTH, cond)
    roles = build_roles(family, ["student", "fake"], 2)
    generator = torch.Generator().manual_seed(1)
    for role in (roles.student, roles.fake):
        assert torch.equal(role(X, BOTH, cond).flow, roles.teacher(X, BOTH, cond).flow)  # all start as the teacher
        for name, p in role.named_parameters().items():
            if "lora_B" in name:
                p.data.normal_(0, 0.2, generator=generator)
    assert torch.allclose(roles.teacher(X, BOTH, cond).flow, before, rtol=0, atol=1e-5)  # and it stays what it was
    for p in roles.student.parameters():
        p.requires_grad_()
    if checkpointed:
        enable_checkpointing(family.net)
    return roles, cond


def test_adapters_lie_on_both_experts():
    roles, cond = adapted()
    names = {name.split(".")[0] for name in roles.student.named_parameters()}
    assert names == {"transformer", "transformer_2"}
    with torch.no_grad():
        outs = [roles[who](X, BOTH, cond).flow for who in ("teacher", "student", "fake")]
    for a, b in [(0, 1), (0, 2), (1, 2)]:
        assert ((outs[a] - outs[b]).abs().flatten(1).amax(1) > 1e-3).all()  # for each sample, on either side


@pytest.mark.parametrize(
    ("t", "moved"), [(HIGH, {"transformer"}), (LOW, {"transformer_2"}), (BOTH, {"transformer", "transformer_2"})]
)
def test_only_experts_that_were_asked_get_gradients(t, moved):
    roles, cond = adapted()
    roles.student(X, t, cond).flow.square().sum().backward()
    got = {name.split(".")[0] for name, p in roles.student.named_parameters().items() if p.grad is not None and p.grad.any()}
    assert got == moved
    assert all(p.grad is None for who in ("teacher", "fake") for p in roles[who].parameters())


def test_checkpointing_replays_each_expert_in_its_adapter():
    """Backward runs after the fake score was asked, as in DMD2; and the features of one may be in the student's graph."""
    found = []
    for checkpointed in (False, True):
        roles, cond = adapted(checkpointed)
        p = roles.student(X, BOTH, cond)
        q, tokens = roles.fake.features(p.x0, LOW, cond)
        with torch.no_grad():
            roles.teacher(X, HIGH, cond)
        (q.x0.square().sum() + tokens.square().sum()).backward()
        found.append([p.grad for p in roles.student.parameters()])
    assert sum(g.abs().max() > 1e-3 for g in found[0]) > len(found[0]) / 2
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*found, strict=True))


def test_whole_copies_are_of_both_experts():
    family = make(**VARIANTS["experts"])
    roles = build_roles(family, ["student"], None)
    assert isinstance(roles.student.net, Experts) and roles.student.net is not family.net
    assert {name.split(".")[0] for name in roles.student.named_parameters()} == {"transformer", "transformer_2"}
    with pytest.raises(ValueError, match="embed_guidance to null"):
        build_roles(family, ["student"], None, embed_guidance=True)


def test_lora_targets_reach_every_kind_of_layer():
    """Attention, feed-forward, modulation and the last layer; not what makes embeddings of latents, time and text."""
    layers = {n for n, m in pipelines.wan().transformer.named_modules() if isinstance(m, nn.Linear | nn.Conv3d)}
    missed = {n for n in layers if not any(n == t or n.endswith("." + t) for t in Wan.lora_targets)}
    assert missed == {
        "patch_embedding",
        *(f"condition_embedder.{x}_embedder.linear_{i}" for x in ("time", "text") for i in (1, 2)),
    }


SMALL = ("data.resolution=32", "data.frames=5")


def phased(folder, **strategy):
    times = ", ".join(f"{key}: {value}" for key, value in {"phase_steps": 1, **strategy}.items())
    return student(folder, "wan", "train.steps=3", *SMALL, strategy=f"{{name: phased_dmd, {times}}}")


def test_a_phase_that_is_an_expert_s_is_a_file_of_its_own(tmp_path):
    """At shift 3 the second of four steps is at 0.9, above the boundary, and the third below: two files, no turns, and
    what a student never learnt (the other's expert) is in neither."""
    made = phased(tmp_path)
    write_export(made, tmp_path / "e")
    told = read_export(tmp_path / "e")
    assert told.worn == (("student_1", "transformer"), ("student_2", "transformer_2")) and not told.take_turns
    assert told.files["diffusers"] == (NAME, "pytorch_lora_weights_transformer_2.safetensors")
    for (who, network), file in zip(told.worn, told.files["diffusers"], strict=True):
        state, learnt = load_file(tmp_path / "e" / file), made.roles[who].named_parameters()
        assert state.keys() == {f"transformer.{n.split('.', 1)[1]}" for n in learnt if n.startswith(f"{network}.")}
        assert all(torch.equal(x, learnt[name.replace("transformer", network, 1)]) for name, x in state.items())
    assert 4 in told.samplers and 8 not in told.samplers


@pytest.mark.parametrize(
    ("strategy", "told"),
    [
        ({"times": [1.0, 0.8, 0.6, 0.4]}, "student_1 asks transformer_2 at 0.8"),
        ({"steps": 3, "phases": 3}, "student_2 asks transformer_2 at 0.8571, student_3 asks transformer_2"),
    ],
)
def test_students_who_would_share_an_expert_are_refused_before_training(tmp_path, strategy, told):
    with pytest.raises(UserError, match=f"they would share an expert of a WanPipeline.*{told}"):
        serving(phased(tmp_path, **strategy))


def test_a_student_that_hears_another_expert_s_time_is_refused(tmp_path):
    made = student(tmp_path, "wan", *SMALL, strategy="{name: dmd2, steps: 1}")
    how = Inference(made.inference().hops, told=0.5)
    with pytest.raises(UserError, match=r"hears time 0.5 at every step"):
        wearers(made.family, how)
    assert len(wearers(made.family, replace(how, told=0.9))) == 2


def test_the_second_expert_s_file_is_checked(tmp_path):
    made = student(tmp_path, "wan", *SMALL, strategy="{name: dmd2}")
    write_export(made, tmp_path / "e", ("diffusers", "fused"))
    second = tmp_path / "e" / "pytorch_lora_weights_transformer_2.safetensors"
    save_file({name: torch.zeros_like(x) for name, x in load_file(second).items()}, second)
    with pytest.raises(ExportMismatch, match=f"tensors of {second.name} differ"):
        check_export(made, tmp_path / "e")


@pytest.mark.parametrize("suffix", ["webp", "png", "gif"])
def test_a_video_is_drawn(made, tmp_path, suffix):
    _, out = made["dmd2-wan-renoising"]
    file = sample_run(out, "a red cat", out=tmp_path / f"x.{suffix}")
    with Image.open(file) as video:
        assert (video.n_frames, video.size) == (5, (32, 32))
        video.seek(1)
        video.load()  # a WebP tells its duration only then
        assert video.info["duration"] == pytest.approx(1000 / 16, abs=4)  # a GIF counts in hundredths


def test_a_video_has_no_still_s_suffix(made, tmp_path):
    with pytest.raises(UserError, match=r"must end in .webp or .png or .gif"):
        sample_run(made["dmd2-wan-renoising"][1], "a red cat", out=tmp_path / "x.jpg")


def test_the_card_of_a_video(made):
    text = (made["dmd2-wan-renoising"][1] / "README.md").read_text()
    for part in ('pipeline_tag: "text-to-video"', "a video of 5 frames at 32 x 32", "one for each expert", "export_to_video"):
        assert part in text
    assert "load_into_transformer_2=True" in text and "reproducible only through" in text


def test_a_grid_shows_frames_below_each_other(made, tmp_path):
    distillation, _ = made["dmd2-wan-renoising"]
    samples = Samples(distillation, tmp_path, Line())
    shown = samples.pictures(student_walk(distillation, distillation.inference(2)))
    assert shown.shape == (2, 96, 32, 3)
    with Image.open(samples(0)) as grid:
        assert grid.height == HEAD + 3 * CELL * (1 + 2 * len(distillation.counts))


def test_a_strip_is_of_the_first_middle_and_last_frame():
    frames = torch.arange(9.0)[None, None, :, None, None].expand(1, 3, 9, 2, 4)
    assert strip(frames)[0, 0, :, 0].tolist() == [0, 0, 4, 4, 8, 8]


@pytest.mark.parametrize(("frames", "nearest"), [(80, "77 and 81"), (4, "1 and 5")])
def test_frames_that_the_autoencoder_cannot_divide(frames, nearest):
    with pytest.raises(UserError, match=f"data.frames {frames}: a WanPipeline makes 1 frame.*{nearest}"):
        check_size(Wan(pipelines.wan(), (32, 32), frames))
    check_size(Wan(pipelines.wan(), (32, 32), 81))


def test_pictures_teach_videos_of_one_frame_only(tmp_path):
    with pytest.raises(UserError, match=r"data.frames 5: strategy lcm learns from data.images.*set data.frames to 1"):
        student(tmp_path, "wan", *SMALL, strategy="{name: lcm}")
    made = student(tmp_path, "wan", "data.resolution=32", "data.frames=1", "data.count=4", strategy="{name: lcm}")
    batch, _ = build_batches(made.recipe, made.family)(0, 0)
    assert batch.x0.shape[1:] == made.family.shape == (16, 1, 4, 4)
