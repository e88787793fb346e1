"""The sampling loop against closed forms and against the loops of stock diffusers schedulers."""

from itertools import pairwise

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LCMScheduler, TCDScheduler
from worlds import F64, FLOW, PROCESSES, SD_SCHEDULER, SHIFTED, VP, Consistency, Gaussian, Mixture, Solver, play, spread

from stepdistill.sampling import Hop, Inference, base_first, rollout, sample, trailing, walk

M, C = 0.7, 0.5
EVERY = pytest.mark.parametrize(("schedule", "kind"), PROCESSES)
NOISE = torch.randn(3, 4, dtype=F64, generator=torch.Generator().manual_seed(0))


def hops(schedule, n):
    return trailing(schedule.grid(n))


def test_guidance_makes_two_evaluations_of_a_hop():
    assert Inference((Hop(1.0, scale=3.0), Hop(0.5), Hop(0.25, scale=0.0))).nfe == 5
    assert Inference(()).nfe == 0


@EVERY
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_exact_student_samples_the_data(schedule, kind, steps):
    """The result is affine in the noises: fed with none it is the mean, and with one unit vector after another it holds
    their coefficients, whose squared norm is the variance. On flow those are M and C^2; on DDPM tables a little of the
    mean is lost, for the last time is not all noise and sampling starts as if it were."""
    roles, how = play(schedule, kind, Gaussian(M, C), student=Consistency(M, C)), Inference(hops(schedule, steps))
    axes = iter(torch.eye(steps, dtype=F64)[:, None])
    mean = sample(roles, how, torch.zeros(1, steps, dtype=F64), {}, torch.zeros_like)
    varied = sample(roles, how, next(axes), {}, lambda x: next(axes)) - mean
    assert next(axes, None) is None  # every noise was used

    want, variance = 0.0, None
    for hop in how.hops:
        a, s = (c.item() for c in schedule.alpha_sigma(torch.tensor([hop.time], dtype=F64)))
        shrink = C / spread(a, s, C)
        want, variance = (
            (M - shrink * a * M, shrink**2)
            if variance is None
            else (M + shrink * a * (want - M), shrink**2 * (a**2 * variance + s**2))
        )
    assert mean.flatten().tolist() == pytest.approx([want] * steps, rel=1e-9)
    assert varied.square().sum().item() == pytest.approx(variance, rel=1e-9)
    if schedule is not VP:
        assert (want, variance) == pytest.approx((M, C**2), rel=1e-9)


@pytest.mark.parametrize("kind", ["eps", "v"])
@pytest.mark.parametrize(("steps", "original"), [(1, 100), (2, 100), (4, 100), (5, 100), (8, 1000)])
def test_renoising_is_the_loop_of_lcm_scheduler(kind, steps, original):
    roles = play(VP, kind, Mixture(), student=Mixture())
    types = {"eps": "epsilon", "v": "v_prediction"}
    stock = LCMScheduler(**SD_SCHEDULER, prediction_type=types[kind], original_inference_steps=original)
    stock.set_timesteps(steps)
    x, generator = NOISE, torch.Generator().manual_seed(1)
    for k in stock.timesteps:
        raw = roles.student.family.forward(roles.student.net, x, torch.full([3], k.item() / 999, dtype=F64), {})
        x, clean = stock.step(raw, k, x, generator, return_dict=False)
    generator = torch.Generator().manual_seed(1)
    got = sample(roles, Inference(hops(VP, steps)), NOISE, {}, lambda x: torch.randn(x.shape, generator=generator, dtype=F64))
    assert torch.allclose(got, clean, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["eps", "v"])
@pytest.mark.parametrize("steps", [1, 2, 4, 5, 8])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_eta_is_the_loop_of_tcd_scheduler(kind, steps, eta):
    """To the end, which is timestep 0 and not clean."""
    roles = play(VP, kind, Mixture(), student=Mixture())
    types = {"eps": "epsilon", "v": "v_prediction"}
    stock = TCDScheduler(**SD_SCHEDULER, prediction_type=types[kind], original_inference_steps=1000)
    stock.set_timesteps(steps)
    x, generator = NOISE, torch.Generator().manual_seed(1)
    for k in stock.timesteps:
        raw = roles.student.family.forward(roles.student.net, x, torch.full([3], k.item() / 999, dtype=F64), {})
        x = stock.step(raw, k, x, eta, generator, return_dict=False)[0]
    drawn, generator = [], torch.Generator().manual_seed(1)
    how = Inference(hops(VP, steps), eta=eta)
    got = sample(roles, how, NOISE, {}, lambda x: drawn.append(1) or torch.randn(x.shape, generator=generator, dtype=F64))
    assert (
        torch.allclose(got, x, rtol=0, atol=1e-5) and len(drawn) == (steps - 1 if how.draws else 0) and how.draws == (eta > 0)
    )
    if steps == 1:  # the little noise of timestep 0 is left
        assert (got - sample(roles, Inference(hops(VP, 1)), NOISE, {})).abs().max() > 1e-3


@EVERY
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_an_exact_student_with_all_new_noise_samples_the_data_in_any_number_of_steps(schedule, kind, steps):
    """At time 0, where the exact marginal of what comes out is that of the ODE from what went in."""
    (a_0, s_0), (a_1, s_1) = ([c.item() for c in schedule.alpha_sigma(torch.tensor([t], dtype=F64))] for t in (0.0, 1.0))
    exact = Solver(M, C, schedule, torch.zeros_like)
    roles, how = play(schedule, kind, Gaussian(M, C), student=exact), Inference(hops(schedule, steps), eta=1.0)
    axes = iter(torch.eye(steps, dtype=F64)[:, None])
    mean = sample(roles, how, torch.full((1, steps), a_1 * M, dtype=F64), {}, torch.zeros_like)
    noise = a_1 * M + spread(a_1, s_1, C) * next(axes)  # of the marginal at time 1
    varied = sample(roles, how, noise, {}, lambda x: next(axes)) - mean
    assert next(axes, None) is None
    assert mean.flatten().tolist() == pytest.approx([a_0 * M] * steps, rel=1e-9)
    assert varied.norm().item() == pytest.approx(spread(a_0, s_0, C), rel=1e-9)


@pytest.mark.parametrize("schedule", [FLOW, SHIFTED])
def test_eta_on_flow_goes_from_euler_to_new_noise(schedule):
    roles = play(schedule, "flow", Mixture(), student=Mixture())
    for eta, renoise in ((0.0, False), (1.0, True)):
        one, other = (
            sample(roles, how, NOISE, {}, torch.ones_like)
            for how in (Inference(hops(schedule, 4), eta=eta), Inference(hops(schedule, 4), renoise))
        )
        assert torch.allclose(one, other, rtol=1e-12)
    how = Inference((Hop(1.0), Hop(0.5)), eta=0.2)
    p = roles.student(NOISE, NOISE.new_ones(3), {})
    x_s = 0.6 * p.x0 + 0.4 * p.eps  # at 0.8 of 0.5
    want = 0.5 / 0.6 * x_s + (0.5**2 - (0.5 / 0.6 * 0.4) ** 2) ** 0.5
    assert torch.allclose(rollout(roles, how, NOISE, {}, torch.ones_like, 1)[0], want, rtol=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_euler_is_the_loop_of_flow_match_euler(steps):
    """Its own grid ends at sigma 0.001; shift_terminal = 1 / N makes it the trailing one."""
    roles = play(FLOW, "flow", Mixture(), student=Mixture())
    stock = FlowMatchEulerDiscreteScheduler(shift=1.0, shift_terminal=1 / steps if steps > 1 else None)
    stock.set_timesteps(steps)
    x = NOISE.float()
    for k in stock.timesteps:
        raw = roles.student.family.forward(roles.student.net, x, (k / 1000).expand(3), {})
        x = stock.step(raw, k, x, return_dict=False)[0]
    got = sample(roles, Inference(hops(FLOW, steps), renoise=False), NOISE.float(), {})
    assert torch.allclose(got, x, rtol=0, atol=2e-6)


@EVERY
def test_steps_of_the_teacher_follow_the_ode(schedule, kind):
    """First order, with the known constant: n steps contract by the product of cos dphi."""
    roles = play(schedule, kind, Gaussian(M, C), student=Mixture())
    errors = []
    for n in (16, 32, 64):
        t = torch.linspace(0.9, 0.1, n + 1, dtype=F64)
        a, s = schedule.alpha_sigma(t)
        x = start = a[0] * M + torch.tensor([[-1.0, 0.5, 2.0]], dtype=F64)
        for here, there in pairwise(t):
            x = roles.move(roles.teacher(x, here[None], {}), there[None])
        exact = a[-1] * M + spread(a[-1], s[-1], C) / spread(a[0], s[0], C) * (start - a[0] * M)
        cosines = torch.atan2(s, a * C).diff().cos().prod()
        assert torch.allclose(x - a[-1] * M, cosines * (exact - a[-1] * M), rtol=1e-9)
        errors.append((x - exact).abs().max().item())
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.1) and errors[1] / errors[2] == pytest.approx(2, abs=0.05)


@EVERY
def test_steps_of_a_mixture_teacher_converge_at_first_order(schedule, kind):
    roles, ends = play(schedule, kind, Mixture()), []
    for n in (20, 40, 80):
        x = NOISE
        t = torch.linspace(0.95, 0.05, n + 1, dtype=F64)
        for here, there in pairwise(t):
            x = roles.move(roles.teacher(x, here.expand(3), {}), there.expand(3))
        ends.append(x)
    ratio = (ends[0] - ends[1]).norm() / (ends[1] - ends[2]).norm()
    assert ratio.item() == pytest.approx(2, abs=0.3)


class Spy(Gaussian):
    """Remembers the time it hears, its batch and its condition."""

    def __init__(self, mean, std):
        super().__init__(mean, std)
        self.calls = []

    def forward(self, x_t, a, s, cond):
        self.calls.append((FLOW.time(torch.atan2(s, a).flatten()[0]).item(), len(x_t), cond))
        return super().forward(x_t, a, s, cond)


def test_hops_name_their_role_time_and_guidance():
    """Base-first sampling: the guided teacher makes the first step, the student the others."""
    roles = play(FLOW, "flow", Spy(None, C), student=Spy(M, C))
    cond, null = ({"mean": torch.full((3, 1), m, dtype=F64)} for m in (1.0, -0.5))
    how = Inference((Hop(1.0, "teacher", 4.0), Hop(0.6), Hop(0.3)), renoise=False)
    x_t, t = rollout(roles, how, NOISE, cond, torch.zeros_like, 1, null)
    exact = Gaussian(-0.5 + 4 * 1.5, C)(NOISE, *(torch.tensor([[c]], dtype=F64) for c in (0.0, 1.0)), {})
    assert torch.allclose(x_t, 0.4 * exact[0] + 0.6 * exact[1], rtol=1e-9) and t.tolist() == [0.6] * 3
    sample(roles, how, NOISE, cond, null=null)
    assert [call[:2] for call in roles.teacher.net.calls] == [(1.0, 6)] * 2
    assert [call[0] for call in roles.student.net.calls] == pytest.approx([0.6, 0.3])


def test_base_first():
    """The first two of four steps are the guided teacher's, at a doubled batch, the others the student's; at no other times."""
    roles = play(FLOW, "flow", Spy(None, C), student=Spy(M, C))
    cond, null = ({"mean": torch.full((3, 1), m, dtype=F64)} for m in (1.0, -0.5))
    plain = Inference(hops(FLOW, 4), renoise=False)
    sample(roles, base_first(plain, 2, 4.0), NOISE, cond, null=null)
    assert [call[:2] for call in roles.teacher.net.calls] == [(1.0, 6), (0.75, 6)]
    assert [call[:2] for call in roles.student.net.calls] == [(0.5, 3), (0.25, 3)]
    assert base_first(plain, 0, 4.0) == plain and base_first(plain, 3, 1.0).hops[3:] == plain.hops[3:]
    for k in (4, 5, -1):
        with pytest.raises(ValueError, match=f"^{k} of 4 steps by the base leave none to the student; it can be 0 to 3$"):
            base_first(plain, k, 4.0)


@EVERY
@pytest.mark.parametrize("how", [{}, {"renoise": False}, {"eta": 1.0}])
def test_the_bases_steps_are_deterministic_whatever_the_students_are(schedule, kind, how):
    """With an exact base: from the ODE's first-order step on, only the student's steps draw."""
    roles, drawn = play(schedule, kind, Gaussian(M, C), student=Consistency(M, C)), []
    mixed = base_first(Inference(hops(schedule, 3), **how), 1, 1.0)
    made = [x for _, x in walk(roles, mixed, NOISE, {}, lambda x: drawn.append(1) or torch.ones_like(x))]
    (a, s), (b, r) = (schedule.alpha_sigma(torch.tensor([hop.time], dtype=F64)) for hop in mixed.hops[:2])
    x0, eps = Gaussian(M, C)(NOISE, a, s, {})
    assert torch.allclose(made[0], b * x0 + r * eps, rtol=1e-9) and len(drawn) == (how.get("renoise", True))
    after = list(walk(roles, Inference(mixed.hops[1:], **how), made[0], {}, torch.ones_like))
    assert torch.equal(after[-1][1], made[-1])


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_teacher_hears_neither_a_students_time_nor_its_guidance(scale):
    roles = play(FLOW, "flow", Spy(M, C), student=Spy(M, C))
    how = Inference(hops(FLOW, 2), renoise=False, told=0.3, guidance=7.5)
    sample(roles, base_first(how, 1, scale), NOISE, {"x": NOISE}, null={"x": NOISE})
    assert [call[0] for call in roles.teacher.net.calls] == [1.0] and "guidance" not in roles.teacher.net.calls[0][2]
    assert [call[0] for call in roles.student.net.calls] == pytest.approx([0.3])
    assert roles.student.net.calls[0][2]["guidance"].tolist() == [7.5] * 3


@EVERY
@pytest.mark.parametrize("how", [{}, {"renoise": False}, {"eta": 0.3}])
def test_walk_shows_every_prediction_on_the_way_of_sample(schedule, kind, how):
    """The first of an exact teacher is the posterior mean of pure noise; of the last sampling is made, with the same draws."""
    roles, how = play(schedule, kind, Gaussian(M, C)), Inference(trailing(schedule.grid(3), "teacher"), **how)
    if how.eta and schedule is not VP:
        how = Inference(how.hops, eta=1.0)
    generators = [torch.Generator().manual_seed(1) for _ in range(3)]
    normals = [lambda x, g=g: torch.randn(x.shape, generator=g, dtype=F64) for g in generators]
    made = list(walk(roles, how, NOISE, {}, normals[0]))
    a, s = (c.item() for c in schedule.alpha_sigma(torch.ones(1, dtype=F64)))
    mean = M + a * C**2 / (a**2 * C**2 + s**2) * (NOISE - a * M)
    assert len(made) == 3 and torch.allclose(made[0][0].x0, mean, rtol=1e-9)
    assert torch.equal(made[-1][1], sample(roles, how, NOISE, {}, normals[1]))
    assert torch.equal(made[0][1], rollout(roles, how, NOISE, {}, normals[2], 1)[0])
    if how.eta is None:
        assert torch.equal(made[-1][1], made[-1][0].x0)
    t = NOISE.new_full([3], how.hops[1].time)
    assert torch.allclose(made[1][0].x0, roles.teacher(made[0][1], t, {}).x0, rtol=1e-12)


def test_told_is_what_the_network_hears():
    """The network hears 0.5 throughout, and its answer is still read at the hop's own time."""
    roles = play(FLOW, "x0", Gaussian(M, C), student=Spy(M, C))
    how = Inference((Hop(1.0), Hop(0.75)), renoise=False, told=0.5, guidance=7.5)
    x_t, _ = rollout(roles, how, NOISE, {}, torch.zeros_like, 1)
    x0 = Gaussian(M, C)(NOISE, 0.5, 0.5, {})[0]
    assert torch.allclose(x_t, 0.25 * x0 + 0.75 * NOISE, rtol=1e-9)
    sample(roles, how, NOISE, {})
    assert [call[0] for call in roles.student.net.calls] == pytest.approx([0.5] * 3)
    assert all(call[2]["guidance"].tolist() == [7.5] * 3 for call in roles.student.net.calls)


def test_no_gradient_and_no_noise_beyond_need():
    roles = play(VP, "eps", Gaussian(torch.nn.Parameter(torch.tensor(M, dtype=F64)), C), student=Consistency(M, C))
    drawn = []
    for renoise in (True, False):
        how = Inference(trailing(VP.grid(4), role="teacher"), renoise)
        x0 = sample(roles, how, NOISE, {}, lambda x: drawn.append(1) or torch.zeros_like(x))
        assert not x0.requires_grad and torch.is_grad_enabled()
    assert len(drawn) == 3


def test_swap_plays_the_student_by_another():
    roles = play(FLOW, "flow", Gaussian(M, C), student=Consistency(M, C), average=Consistency(M + 1, C))
    how = Inference(hops(FLOW, 1))
    swapped = sample(roles.swap(student=roles.average), how, NOISE, {})
    assert torch.allclose(swapped, sample(roles, how, NOISE, {}) + 1) and roles.swap().teacher is roles.teacher
    with pytest.raises(AttributeError, match="'critic' is not one of teacher, student, average"):
        _ = roles.critic
