"""One training step of every strategy as LoRA on tiny networks of each kind: finite, the right weights move, nothing else."""

from __future__ import annotations

import copy
import functools

import pipelines
import pytest
import torch

from stepdistill import distributed
from stepdistill.batch import Batch, Draw
from stepdistill.families import FAMILIES
from stepdistill.roles import build_roles, enable_checkpointing
from stepdistill.strategies import DMD2, RCM, SCM, STRATEGIES, TSCD, VSD, FDistill, PhasedDMD

OWN = {  # fields that make one step move every player; others have their defaults
    "dmd2, gan": DMD2(student_every=1, gan=0.1, steps=2),
    "dmd2, decoupled": DMD2(student_every=1, decoupled=True, steps=2),
    "f_distill": FDistill(student_every=1, steps=2),
    "phased_dmd": PhasedDMD(student_every=1, steps=2),
    "scm, exact": SCM(difference=None, trajectory=1),
    "rcm": RCM(warmup=0, student_every=2),
    "tscd, score": TSCD(score=True, steps=1, student_every=1),
    "vsd": VSD(guidance=(2.0, 4.0)),
}
CASES = OWN | {name: kind() for name, kind in STRATEGIES.items() if name not in OWN}
NETWORKS = {
    "sd": pipelines.sd,
    "sdxl": pipelines.sdxl,
    "sd3": pipelines.sd3,
    "flux": pipelines.flux,
    "wan 2.2": functools.partial(pipelines.wan, boundary_ratio=0.6),  # two experts, which take turns in time
}


def step(strategy, network: str, checkpointing: bool):
    """One step on two samples; returns the losses, and by role (or module) the entries that it changed."""
    pipe = NETWORKS[network]()
    family = FAMILIES[type(pipe).__name__](pipe)
    if family.guidance_distilled and hasattr(strategy, "guidance"):
        strategy.guidance = 1.0 if isinstance(strategy.guidance, float) else (1.0, 1.0)
    base = {name: x.clone() for name, x in family.net.state_dict().items()}
    roles = build_roles(family, strategy.roles, rank=4)
    torch.manual_seed(0)
    strategy.setup(roles)
    if checkpointing:
        enable_checkpointing(family.net)
    stage = strategy.stages - 1  # the last one, where others have been trained before
    at = next(k for k in range(10_000) if strategy.stage(k) == stage)
    strategy.enter(roles, stage)
    everyone = {**roles, **strategy.modules()}
    params = {who: [p for name in names for p in everyone[name].parameters()] for who, names in strategy.players(stage).items()}
    for p in (p for some in params.values() for p in some):
        p.requires_grad_()
    before = {name: [p.detach().clone() for p in one.parameters()] for name, one in everyone.items()}
    generator = torch.Generator().manual_seed(0)
    noise, x0 = torch.randn(2, 2, *family.latent_shape(16, 16), generator=generator)
    null = family.null_prompts()
    null = null and {name: x.expand(2, *x.shape[1:]) for name, x in null.items()}
    batch = Batch(noise, family.encode_prompts(["a red cat", "a blue dog"]), null, x0)
    losses = {}
    for who, loss, _ in strategy.losses(roles, batch, Draw(0, at, range(2))):
        distributed.backward(loss, params[who])
        losses[who] = losses.get(who, 0.0) + loss.item()
    for who in losses:
        torch.optim.AdamW(params[who], 1e-2).step()
    now = family.net.state_dict()
    assert all(torch.equal(x, now.get(name, now.get(wrapped(name)))) for name, x in base.items())  # the teacher
    moved = {
        name: [p.detach() - old for p, old in zip(one.parameters(), before[name], strict=True)]
        for name, one in everyone.items()
    }
    return losses, moved, {name for who in losses for name in strategy.players(stage)[who]}


def wrapped(name: str) -> str:
    """A weight's name once PEFT has wrapped its layer."""
    module, _, which = name.rpartition(".")
    return f"{module}.base_layer.{which}"


BOTH = [(case, network) for case in CASES for network in NETWORKS]
BOTH.remove(("dmd2, decoupled", "flux"))  # its guidance is distilled: there is none to decouple
# every time: each strategy on a schedule of either kind, and on each network a score, a derivative, a discriminator, phases
EVERYWHERE = ("dmd2, gan", "rcm", "phased_dmd")
ALWAYS = [(case, network) for case, network in BOTH if network in ("sd", "sd3") or case in EVERYWHERE]
EVERY = [pair if pair in ALWAYS else pytest.param(*pair, marks=pytest.mark.long) for pair in BOTH]


@pytest.mark.parametrize(("case", "network"), EVERY)
def test_one_step(case, network):
    losses, moved, trained = step(copy.deepcopy(CASES[case]), network, checkpointing=False)
    assert all(torch.tensor(loss).isfinite() for loss in losses.values()) and "student" in losses
    for name, changes in moved.items():
        assert any(change.any() for change in changes) == (name in trained), name
    again, replayed, _ = step(copy.deepcopy(CASES[case]), network, checkpointing=True)
    assert again == losses
    for name, changes in moved.items():
        assert all(map(torch.equal, changes, replayed[name])), name


@pytest.mark.parametrize("phase", [0, 1])
def test_phases_that_meet_at_the_experts_boundary_train_one_expert_each(phase):
    family = FAMILIES["WanPipeline"](pipelines.wan(boundary_ratio=0.6))
    strategy = PhasedDMD(steps=2, phase_steps=1, student_every=1, times=(1.0, 0.5), guidance=2.0)
    roles = build_roles(family, strategy.roles, rank=4)
    noise = torch.randn(2, *family.latent_shape(16, 16), generator=torch.Generator().manual_seed(0))
    null = {name: x.expand(2, *x.shape[1:]) for name, x in family.null_prompts().items()}
    batch = Batch(noise, family.encode_prompts(["a red cat", "a blue dog"]), null)
    names = roles[strategy.students[phase]].named_parameters()
    for p in names.values():
        p.requires_grad_()
    who, loss, _ = next(strategy.losses(roles, batch, Draw(0, phase, range(2))))
    distributed.backward(loss, list(names.values()))
    trained = {name.split(".")[0] for name, p in names.items() if p.grad is not None}
    assert who == "student" and trained == {("transformer", "transformer_2")[phase]}
