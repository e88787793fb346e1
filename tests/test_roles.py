"""Roles on real diffusers networks: the traps that were measured, by their numbers in the design, each also with its remedy
switched off."""

import copy

import pipelines
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from worlds import FLOW, SHIFTED, VP

from stepdistill.diffusion import read
from stepdistill.errors import UserError
from stepdistill.families import SD, SD3
from stepdistill.roles import Denoiser, build_roles, enable_checkpointing, wearing, worn
from stepdistill.strategies.shared import INSIDE

X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
T = torch.tensor([0.35, 0.8])


@pytest.fixture(scope="module")
def stock():
    return {"sd": pipelines.sd(), "sd3": pipelines.sd3()}


@pytest.fixture(params=["sd", "sd3"])
def family(request, stock):
    """A family on a fresh copy of the network, and its condition."""
    pipe = copy.copy(stock[request.param])
    name = {"sd": "unet", "sd3": "transformer"}[request.param]
    setattr(pipe, name, copy.deepcopy(getattr(pipe, name)))
    return {"sd": SD, "sd3": SD3}[request.param](pipe)


@pytest.fixture
def cond(family):
    return family.encode_prompts(["a red cat", "a dog"])


def fill(roles, *names):
    """Opens these adapters and gives each B values of its own, as training would."""
    for name in names:
        for key, p in roles[name].named_parameters().items():
            p.requires_grad_()
            if "lora_B" in key:
                p.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(key) + ord(name[0])))


def silent(family):
    """Adapters that no loss can reach: SD3's last block throws its text tokens away."""
    last = f"transformer_blocks.{len(getattr(family.net, 'transformer_blocks', [])) - 1}.attn.add_q_proj"
    return lambda name: name.startswith(last)


def test_gradients_survive_a_change_of_role(family, cond):
    """Trap 1. PEFT's own set_adapter between forward and backward closes the student: its gradients vanish."""

    def gradients(change):
        roles.student.net.zero_grad(set_to_none=True)
        for p in roles.student.parameters():
            p.requires_grad_()
        loss = roles.student(X, T, cond).x0.square().mean()
        change()
        loss.backward()
        return {name: p.grad for name, p in roles.student.named_parameters().items()}

    def ours():
        with torch.no_grad():
            roles.teacher(X, T, cond), roles.fake(X, T, cond)

    def peft_s():
        for module in family.net.modules():
            if isinstance(module, BaseTunerLayer):
                module.set_adapter("fake")

    roles = build_roles(family, ["student", "fake"], 2)
    fill(roles, "student", "fake")
    unreachable = silent(family)
    for name, grad in gradients(ours).items():
        assert grad is not None and (unreachable(name) or grad.any()), name
    assert not any(p.grad is not None for p in roles.fake.parameters())
    assert all(grad is None for grad in gradients(peft_s).values())


def losses(roles, cond):
    """Student -> fake's features -> student and fake both in the graph, and other roles worn before backward."""
    student = roles.student(X, T, cond)
    p, tokens = roles.fake.features(student.x0, T, cond)
    with torch.no_grad():
        roles.teacher(X, T, cond)
    return student.x0.square().mean() + tokens.square().mean() + p.x0.square().mean()


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_checkpointing_replays_the_role_that_was_worn(family, cond, precision):
    """Trap 2. Error against no checkpointing: 0. Plain checkpointing replays the student's blocks as the fake's."""

    def gradients():
        loss = losses(roles, cond)
        with wearing(family.net, "fake"):
            return torch.autograd.grad(loss, roles.student.parameters() + roles.fake.parameters())

    roles = build_roles(family, ["student", "fake"], 2, precision=precision)
    fill(roles, "student", "fake")
    plain = gradients()
    enable_checkpointing(family.net)
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))
    assert worn(family.net) is None
    family.net.enable_gradient_checkpointing()
    assert not all(torch.allclose(a, b, rtol=0.1) for a, b in zip(plain, gradients(), strict=True))


def test_a_network_without_checkpointing_is_refused(family, monkeypatch):
    monkeypatch.setattr(type(family.net), "_supports_gradient_checkpointing", False)
    with pytest.raises(
        UserError, match=r"train.checkpointing true: diffusers' \w+ cannot recompute its blocks; set it to false"
    ):
        enable_checkpointing(family.net)


def test_a_checkpointed_graph_can_be_walked_twice(family, cond):
    """Two backward passes through one forward, as adaptive weights and gradient penalties make them."""
    roles = build_roles(family, ["student", "fake"], 2)
    fill(roles, "student", "fake")
    enable_checkpointing(family.net)
    loss = roles.student(X, T, cond).x0.square().mean()
    first = torch.autograd.grad(loss, roles.student.parameters(), retain_graph=True)
    roles.fake(X, T, cond)
    again = torch.autograd.grad(loss, roles.student.parameters())
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_an_average_starts_as_the_student(family, cond):
    """Trap 6. A is random, and each adapter's is its own: interpolating different A and B is no average."""
    roles = build_roles(family, ["student", "target"], 2)
    fill(roles, "student")
    student, target = roles.student.named_parameters(), roles.target.named_parameters()
    assert student.keys() == target.keys()
    assert not any(torch.equal(p, target[name]) for name, p in student.items())
    roles.target.follow(roles.student)
    assert all(torch.equal(p, target[name]) for name, p in student.items())
    assert torch.equal(roles.target(X, T, cond).x0, roles.student(X, T, cond).x0)
    before = {name: p.detach().clone() for name, p in target.items()}
    fill(roles, "student")
    with torch.no_grad():
        torch._foreach_add_(roles.student.parameters(), 1.0)
    roles.target.follow(roles.student, 0.75)
    assert all(torch.allclose(p, 0.75 * before[n] + 0.25 * student[n], atol=1e-6) for n, p in target.items())


def test_roles_start_as_the_teacher_and_the_teacher_as_the_base(family, cond):
    """Trap 7. Nothing is worn, nothing requires grad, and what each role may train is its own."""
    raw, want = family.forward(family.net, X, T, cond), Denoiser(family, family.net)(X, T, cond).x0
    roles = build_roles(family, ["student", "fake", "target"], 2)
    assert worn(family.net) is None and not any(p.requires_grad for p in family.net.parameters())
    assert torch.equal(family.forward(family.net, X, T, cond), raw)
    answers = [role(X, T, cond).x0 for role in roles.values()]
    assert len(answers) == 4 and all(torch.equal(answer, want) for answer in answers)
    fill(roles, "student", "fake")
    assert torch.equal(roles.target(X, T, cond).x0, roles.teacher(X, T, cond).x0)
    assert not torch.equal(roles.student(X, T, cond).x0, roles.fake(X, T, cond).x0)
    assert torch.equal(roles.teacher(X, T, cond).x0, want)
    owned = [{id(p) for p in role.parameters()} for role in roles.values()]
    assert [len(ids) for ids in owned] == [0] + [2 * len(layers(family.net))] * 3 and not set.intersection(*owned[1:])


def layers(net):
    return [m for m in net.modules() if isinstance(m, BaseTunerLayer)]


def test_no_adapter_is_worn_after_calls_and_exceptions(family, cond):
    """Trap 10."""
    roles = build_roles(family, ["student", "fake"], 2)
    roles.student(X, T, cond), roles.fake.features(X, T, cond), roles.student.guided(X, T, cond, cond, 3.0)
    assert worn(family.net) is None
    with pytest.raises(KeyError):
        roles.student.features(X, T, {})
    assert worn(family.net) is None and not family.feature_block(family.net)._forward_hooks
    with wearing(family.net, "student"):
        with pytest.raises(KeyError):
            roles.fake(X, T, {})
        assert worn(family.net) == "student"
        roles.teacher(X, T, cond)
        assert worn(family.net) == "student"
    assert worn(family.net) is None
    assert all((m._disable_adapters, m._active_adapter) == (True, []) for m in layers(family.net))


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_adapters_of_a_bf16_base_are_float32(family, cond, precision):
    """Trap 13. At lr 1e-5 every entry of A moves; in bf16 almost none would."""
    family.net.to(torch.bfloat16)
    roles = build_roles(family, ["student"], 2, precision=precision)
    fill(roles, "student")
    assert {p.dtype for p in roles.student.parameters()} == {torch.float32}
    prediction = roles.student(X, T, cond)
    assert prediction.x0.dtype == prediction.eps.dtype == torch.float32 and worn(family.net) is None
    prediction.x0.square().mean().backward()
    reached = [p for name, p in roles.student.named_parameters().items() if "lora_A" in name and p.grad.any()]

    def moved(params):
        optimizer = torch.optim.AdamW(params, lr=1e-5, weight_decay=0.0)
        before = [p.detach().clone() for p in params]
        optimizer.step()
        change = torch.cat([(p != b)[p.grad != 0].flatten() for p, b in zip(params, before, strict=True)])
        return change.float().mean().item()

    low = [p.detach().bfloat16().requires_grad_() for p in reached]
    for p, full in zip(low, reached, strict=True):
        p.grad = full.grad.bfloat16()
    assert moved(reached) > 0.999 and moved(low) < 0.1


@pytest.mark.parametrize("schedule", [VP, FLOW, SHIFTED])
@pytest.mark.parametrize("kind", ["eps", "x0", "v", "flow"])
def test_nothing_is_infinite_at_drawn_times(schedule, kind):
    """Trap 15. At the ends themselves, eps from x0 (sigma 0) or x0 from eps (alpha 0) would be."""
    t = schedule.warp(torch.tensor(INSIDE).repeat(2))
    raw = torch.tensor([[3.0], [3.0], [-1.0], [-1.0]])
    p = read(kind, raw, torch.ones(4, 1), *schedule.alpha_sigma(t))
    for value in (p.x0, p.eps, p.score, p.v, p.flow):
        assert value.isfinite().all() and value.abs().max() < 1e6
    assert not read("x0", raw[:1], torch.ones(1, 1), *FLOW.alpha_sigma(torch.zeros(1))).eps.isfinite().any()


def test_whole_copies_are_networks_of_their_own(family, cond):
    roles = build_roles(family, ["student", "target"], None)
    base = {name: p.clone() for name, p in family.net.named_parameters()}
    want = roles.teacher(X, T, cond).x0
    assert roles.student.whole and roles.student.net is not family.net is roles.teacher.net
    assert roles.student.named_parameters().keys() == base.keys() and roles.teacher.parameters() == []
    assert torch.equal(roles.student(X, T, cond).x0, want)
    with torch.no_grad():
        torch._foreach_add_(roles.student.parameters(), 0.01)
    assert torch.equal(roles.teacher(X, T, cond).x0, want) and not torch.equal(roles.student(X, T, cond).x0, want)
    roles.target.follow(roles.student, 0.9)
    assert all(torch.allclose(p, base[name] + 0.001) for name, p in roles.target.named_parameters().items())
    roles.student.reset()
    assert torch.equal(roles.student(X, T, cond).x0, want)


def test_an_adapter_resets_to_the_teacher(family, cond):
    roles = build_roles(family, ["student", "fake"], 2)
    fill(roles, "student", "fake")
    fake = roles.fake(X, T, cond).x0
    assert not torch.equal(roles.student(X, T, cond).x0, roles.teacher(X, T, cond).x0)
    roles.student.reset()
    assert torch.equal(roles.student(X, T, cond).x0, roles.teacher(X, T, cond).x0)
    assert torch.equal(roles.fake(X, T, cond).x0, fake)


def test_an_embedded_guidance_starts_without_effect(stock):
    family = SD(copy.copy(stock["sd"]))
    cond = family.encode_prompts(["a", "b"])
    roles = build_roles(family, ["student"], None, embed_guidance=True)
    told = cond | {"guidance": torch.tensor([2.0, 7.5])}
    assert torch.equal(roles.student(X, T, told).x0, roles.teacher(X, T, cond).x0)
    assert torch.equal(roles.student(X, T, cond).x0, roles.teacher(X, T, cond).x0)
    weight = roles.student.named_parameters()["time_embedding.cond_proj.weight"].requires_grad_()
    roles.student(X, T, told).x0.square().mean().backward()
    assert weight.grad.any()
    with torch.no_grad():
        weight.add_(weight.grad.sign())
    assert not torch.equal(roles.student(X, T, told).x0, roles.teacher(X, T, cond).x0)
    roles.student.reset()
    assert torch.equal(roles.student(X, T, told).x0, roles.teacher(X, T, cond).x0) and not weight.any()
    assert roles.student.net.config.time_cond_proj_dim == 256 and family.net.config.time_cond_proj_dim is None
    with pytest.raises(ValueError, match="set lora to null"):
        build_roles(family, ["student"], 4, embed_guidance=True)


def test_seeds_make_adapters(stock):
    """The same on every process; another for each name and seed; the global stream is left alone."""

    def weights(name, seed):
        pipe = copy.copy(stock["sd"])
        pipe.unet = copy.deepcopy(pipe.unet)
        return build_roles(SD(pipe), ["other", name], 2, seed=seed)[name].named_parameters()

    torch.manual_seed(5)
    want = torch.rand(1)
    torch.manual_seed(5)
    first = weights("student", 0)
    assert torch.equal(torch.rand(1), want)
    again, fake, other = weights("student", 0), weights("fake", 0), weights("student", 1)
    for name, p in first.items():
        assert torch.equal(p, again[name])
        assert "lora_B" in name or not (torch.equal(p, fake[name]) or torch.equal(p, other[name]))


def test_guidance_one_is_plain(family, cond):
    roles = build_roles(family, ["student"], 2)
    want = roles.teacher(X, T, cond)
    for scale in (1, 1.0, torch.ones(2)):
        assert torch.equal(roles.teacher.guided(X, T, cond, None, scale).x0, want.x0)
    with pytest.raises(ValueError, match="has none"):
        roles.teacher.guided(X, T, cond, None, 2.0)


def test_precision_is_autocast_and_answers_are_float32(family, cond):
    """The base stays float32; bfloat16 inside moves the answer a little, and the algebra is done in float32."""
    roles = build_roles(family, ["student"], 2)
    low = Denoiser(family, family.net, precision=torch.bfloat16)(X, T, cond)
    full = roles.teacher(X, T, cond)
    assert low.x0.dtype == torch.float32 and not torch.equal(low.x0, full.x0)
    a, b = getattr(low, family.kind), getattr(full, family.kind)
    assert (a - b).norm() < 0.05 * b.norm()
