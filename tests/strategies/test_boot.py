"""Bootstrapping in signal space against closed forms in Gaussian worlds (reference: methods, part 11)."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.autograd import grad as gradient
from worlds import F64, FLOW, PROCESSES, SHIFTED, VP, Gaussian, Mixture, Script, play, spread

from stepdistill.batch import Batch, Draw
from stepdistill.sampling import Hop, Inference, ask, sample, trailing
from stepdistill.strategies.boot import BOOT

M, C, N = 0.7, 0.5, 6  # the data's mean and spread; points of the grid
EVERY = pytest.mark.parametrize(("schedule", "kind"), [*PROCESSES, (FLOW, "x0")])
Z = torch.tensor([[-1.0, 1.0]], dtype=F64)  # noise as an exact expectation over N(0, 1), up to the third power


def levels(schedule, times) -> list[torch.Tensor]:
    """alpha and sigma [B, 1] of times [B]."""
    return [c[:, None] for c in schedule.alpha_sigma(torch.as_tensor(times, dtype=F64))]


def angle(a, s):
    return torch.atan2(s, a * C)


def solved(schedule, mean=M, exact=False) -> torch.Tensor:
    """The signal's coefficients at all points of the grid, [N + 1, 2]: y = first + second z.

    DDIM contracts the exact trajectory a_t m + S_t / S_1 (z - a_1 m) about its mean by cos dphi in every step, and its last
    step ends at alpha 1, sigma 0. exact: without that.
    """
    a, s = levels(schedule, schedule.grid(N))
    (a_1, s_1), (a, s) = (a[-1:], s[-1:]), (a.clone(), s.clone())
    a[0], s[0] = 1.0, 0.0
    turns = angle(a, s).diff(dim=0).cos()
    shrink = torch.cat([turns.flip(0).cumprod(0).flip(0), torch.ones(1, 1, dtype=F64)]) if not exact else 1.0
    slope = shrink * spread(a, s, C) / spread(a_1, s_1, C)
    both = torch.cat([a * mean - slope * a_1 * mean, slope - s / s_1], 1)
    both[:-1] /= a[:-1]
    both[-1] = 0.0  # at time 1, where alpha may be 0: no signal
    return both


class Pure(nn.Module):
    """A student of pure noise whose signal, told the k-th point of the grid, is first_k + second_k z."""

    def __init__(self, schedule, kind, table):
        super().__init__()
        self.schedule, self.kind, self.asked = schedule, kind, []
        self.table = nn.Parameter(table.clone())  # [N + 1, 2]

    def forward(self, x_t, a, s, cond):
        """x_t is noise at time 1, a and s are those of the told time; what is returned reads as the signal at time 1."""
        told = self.schedule.time(torch.atan2(s, a).flatten())
        k = (told[:, None] - torch.tensor(self.schedule.grid(N), dtype=F64)).abs().argmin(1)
        self.asked.append(k.tolist())
        y = self.table[k, :1] + self.table[k, 1:] * x_t
        a_1, s_1 = levels(self.schedule, [1.0])
        eps = (x_t - a_1 * y) / s_1
        raw = {"eps": eps, "x0": y, "v": a_1 * eps - s_1 * y, "flow": eps - y}[self.kind]
        return {"eps": (y, raw), "x0": (raw, eps), "v": (-s * raw, a * raw), "flow": (0, raw)}[self.kind]


def world(schedule, kind, table, teacher=None, target=None):
    more = {} if target is None else {"target": Pure(schedule, kind, target)}
    return play(schedule, kind, teacher or Gaussian(M, C), student=Pure(schedule, kind, table), **more)


def run(strategy, roles, **batch):
    """The loss and its logs, with one sample for each point that t may be."""
    batch = Batch(noise=Z.expand(N, -1), **{"cond": {}, "null": None, **batch})
    ((player, loss, logs),) = strategy.losses(roles, batch, Script(integer=torch.arange(1, N + 1)))
    assert player == "student"
    return loss, logs


def walk(strategy, roles, z):
    """The signals [N + 1, B, ...] from noise down, by the strategy's own steps."""
    batch, y, made = Batch(noise=z, cond={}), torch.zeros_like(z), []
    times = [torch.full([len(z)], t, dtype=F64) for t in roles.schedule.grid(strategy.grid)[::-1]]
    for t, s in pairwise(times):
        y = strategy.descend(roles, batch, y, t, s)
        made.append(y)
    return made


@EVERY
def test_the_fixed_point_is_the_product_of_cosines(schedule, kind):
    loss, logs = run(BOOT(grid=N, guidance=1.0), world(schedule, kind, solved(schedule)))
    assert loss.item() < 1e-24 and max(x.item() for x in logs.values()) < 1e-24
    for k in range(N):
        for wrong in torch.eye(2, dtype=F64) * 1e-3:
            table = solved(schedule)
            table[k] += wrong
            assert run(BOOT(grid=N, guidance=1.0), world(schedule, kind, table))[0].item() > 1e-9


@pytest.mark.parametrize("schedule", [FLOW, SHIFTED])
def test_the_exact_solution_of_the_signal_s_ode(schedule):
    """y = m + (S - sigma) / alpha z where alpha_1 = 0: m + c z in the end, and m at first, which is D(z, 1)."""
    a, s = (c[:-1] for c in levels(schedule, schedule.grid(N)))
    want = torch.cat([torch.full_like(a, M), (spread(a, s, C) - s) / a], 1)
    assert torch.allclose(solved(schedule, exact=True)[:-1], want, rtol=0, atol=1e-12)
    assert want[0].tolist() == pytest.approx([M, C])
    assert solved(schedule)[-2].tolist() == pytest.approx([M, 0.0], abs=1e-12)


@EVERY
def test_one_step_s_residual_obeys_the_cosine(schedule, kind):
    """From the exact signal a step misses the next one by (cos dphi - 1) S_s / S_1 (z - a_1 m) / a_s."""
    roles = world(schedule, kind, solved(schedule, exact=True))
    a, s = levels(schedule, schedule.grid(N))
    a_1, S_1 = a[-1:], spread(a[-1:], s[-1:], C)
    a[0], s[0] = 1.0, 0.0
    miss = ((angle(a, s).diff(dim=0).cos() - 1) * spread(a, s, C)[:-1] / S_1 * (Z - a_1 * M) / a[:-1]).square().mean(1)
    loss, logs = run(BOOT(grid=N, guidance=1.0, boundary=0.3), roles)
    assert logs["bootstrapping"].item() == pytest.approx(miss[:-1].mean().item(), rel=1e-9)
    assert logs["boundary"].item() == pytest.approx(miss[-1].item(), rel=1e-9)
    assert loss.item() == pytest.approx((miss[:-1].sum() + 0.3 * miss[-1]).item() / N, rel=1e-9)


@EVERY
def test_the_student_s_end_is_where_the_teacher_s_sampler_takes_the_noise(schedule, kind):
    """A step is DDIM or Euler in terms of the signal, of any teacher: here of a mixture; and so are all together."""
    roles = world(schedule, kind, solved(schedule), Mixture())
    z = torch.randn(5, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    teacher = Inference(trailing(schedule.grid(N), "teacher"), renoise=False)
    made, x = walk(BOOT(grid=N, guidance=1.0), roles, z), z
    assert torch.allclose(made[-1], sample(roles, teacher, z, {}), rtol=0, atol=1e-12)
    for y, here, there in zip(made, teacher.hops, teacher.hops[1:], strict=False):
        t = torch.full([5], there.time, dtype=F64)
        x = roles.move(ask(roles, teacher, here, x, {}), t)
        assert torch.allclose(roles.noise(y, t, z / levels(schedule, [1.0])[1]), x, rtol=0, atol=1e-12)


@EVERY
def test_heun_is_of_second_order(schedule, kind):
    """Half the step, a quarter of the error, where DDIM has half; at the middle of the grid, for its last step is DDIM's."""
    (a_1, s_1), (a, s) = (levels(schedule, [t]) for t in (1.0, schedule.grid(2)[1]))
    middle = M + (spread(a, s, C) / spread(a_1, s_1, C) * (Z - a_1 * M) - s / s_1 * Z) / a
    roles = world(schedule, kind, solved(schedule))

    def errors(solver):
        walks = (walk(BOOT(grid=n, guidance=1.0, solver=solver), roles, Z)[: n // 2] for n in (20, 40, 80))
        return [(made[-1] - middle).abs().max().item() for made in walks]

    for solver, order in (("ddim", 2), ("heun", 4)):
        assert [a / b for a, b in pairwise(errors(solver))] == pytest.approx([order, order], rel=0.2)


@EVERY
@pytest.mark.parametrize("ema", [None, 0.95])
def test_gradient_stops_at_the_target(schedule, kind, ema):
    """It is that of y(z, s) alone, 2 (y - target) / entries; the target comes of the student, or of its average."""
    generator = torch.Generator().manual_seed(0)
    table, other = torch.randn(2, N + 1, 2, dtype=F64, generator=generator)
    roles = world(schedule, kind, table, target=None if ema is None else other)
    strategy = BOOT(grid=N, guidance=1.0, ema=ema, boundary=0.3)
    (got,) = gradient(run(strategy, roles)[0], roles.student.parameters())

    source = (table if ema is None else other).clone()
    source[-1] = 0.0  # at time 1 there is no signal yet, whatever the student says
    t, s = (torch.tensor(schedule.grid(N), dtype=F64)[k] for k in (slice(1, None), slice(-1)))
    y, batch = source[1:, :1] + source[1:, 1:] * Z, Batch(noise=Z.expand(N, -1), cond={})
    off = table[:-1, :1] + table[:-1, 1:] * Z - strategy.descend(roles, batch, y, t, s)
    off[-1] *= 0.3
    want = torch.stack([off.mean(1), (off * Z).mean(1)], 1) * 2 / N
    assert torch.allclose(got[:-1], want, rtol=0, atol=1e-12) and not got[-1].any()
    if ema is not None:
        assert roles.target.net.table.grad is None


def test_the_network_is_told_where_it_goes_and_reads_noise():
    roles = world(VP, "eps", solved(VP))
    run(BOOT(grid=N, guidance=1.0), roles)
    assert roles.student.net.asked == [list(range(1, N + 1)), list(range(N))]
    roles.student.net.asked.clear()
    made = sample(roles, BOOT(grid=N).inference(VP), Z, {})
    assert roles.student.net.asked == [[0]]
    first, second = solved(VP)[0]
    assert torch.allclose(made, first + second * Z, rtol=0, atol=1e-12)


@EVERY
def test_guided_teacher_is_the_teacher_of_the_shifted_mean(schedule, kind):
    """Equal variances: guidance w makes N(m_u + w (m_c - m_u), c^2)."""
    cond, null = ({"mean": torch.full((N, 1), m, dtype=F64)} for m in (1.0, -0.5))
    roles = world(schedule, kind, solved(schedule, -0.5 + 3 * 1.5), Gaussian(None, C))
    assert run(BOOT(grid=N, guidance=3.0), roles, cond=cond, null=null)[0].item() < 1e-22
    assert run(BOOT(grid=N, guidance=2.0), roles, cond=cond, null=null)[0].item() > 1e-2


def test_a_teacher_without_an_empty_prompt():
    """Its guidance is distilled; with guidance 1 nothing needs one."""
    roles = world(FLOW, "flow", solved(FLOW))
    with pytest.raises(ValueError, match="set guidance to 1"):
        run(BOOT(grid=N), roles)


def test_progressive_times():
    """From 1 alone to the whole grid; and real draws cover what they may, from what the teacher is asked at."""
    assert [BOOT(grid=4, progressive=8).reach(step) for step in (0, 1, 2, 3, 4, 6, 7, 100)] == [1, 1, 2, 2, 3, 4, 4, 4]
    assert BOOT(grid=4).reach(0) == 4
    seen = []

    class Spy(Gaussian):
        def forward(self, x_t, a, s, cond):
            seen.append(VP.time(torch.atan2(s, a).flatten()))
            return super().forward(x_t, a, s, cond)

    roles = world(VP, "eps", solved(VP), Spy(M, C))
    z = torch.randn(200, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    for step, points in ((0, 1), (5, 3), (11, N), (50, N)):
        seen.clear()
        list(BOOT(grid=N, guidance=1.0, progressive=12).losses(roles, Batch(noise=z, cond={}), Draw(0, step, range(200))))
        want = [round(t * 999) for t in VP.grid(N)[N + 1 - points :]]
        assert (seen[0] * 999).round().unique().tolist() == want


def test_inference():
    assert BOOT().inference(VP) == BOOT().inference(VP, 1) == Inference((Hop(1.0),), renoise=True, told=0.0)
    assert not BOOT().inference(FLOW).renoise and not BOOT().needs
    with pytest.raises(ValueError, match="set steps to 1"):
        BOOT().inference(VP, 4)
