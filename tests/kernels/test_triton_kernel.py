"""The fused kernel, run by Triton's interpreter, against float64. Results are written over NaN: what is not computed shows."""

import hypothesis.strategies as st
import pytest
import torch
from attending import TANGENTS, Problem, error, normal, problem, truth
from hypothesis import HealthCheck, given, settings
from stepdistill_kernels import attention_jvp, launch, merge
from stepdistill_kernels.attention_jvp import like_queries
from stepdistill_kernels.tiles import LAST, TILES, Tile, tiles, widths

pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value)")  # numpy's, where a row sees no key
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
SMALL = Tile(32, 16, 1, 1)


def solved(of: Problem, tile: Tile | None = None, out_dtype: torch.dtype | None = None, centred: bool = True):
    """o, to, lse and mu by the kernel itself."""
    q, k, v = of.tensors[:3]
    scale = of.how.get("scale", q.shape[3] ** -0.5)
    assert not launch.unable(q, k, v, scale)
    o, to = (like_queries(q, q.shape[3], out_dtype or q.dtype).fill_(float("nan")) for _ in range(2))
    mask = of.how.get("attn_mask")
    mask = None if mask is None else mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    stats = launch.forward(
        *of.tensors, mask, of.how.get("key_lens"), scale, of.how.get("causal", False), o, to, tile=tile, centred=centred
    )
    return o, to, *stats


def check(of: Problem, tile: Tile | None = SMALL, tolerance: float | None = None) -> None:
    for got, want in zip(solved(of, tile), truth(of), strict=True):
        assert error(got, want) < (tolerance or TOLERANCE[of.tensors[0].dtype])


@pytest.mark.parametrize("tangents", TANGENTS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_subset_of_tangents(tangents, dtype):
    check(problem(1, 2, 2, rows=21, keys=37, d=16, tangents=tangents, dtype=dtype), Tile(16, 32, 1, 1))


@pytest.mark.parametrize("n", [48, 40, 1, 16, 33])
def test_any_length(n):
    """48 and 40 are where jvp-flash-attention 0.12 is silently wrong by more than half."""
    check(problem(1, 1, 1, rows=n, keys=n, d=32, dtype=torch.float32), tile=None)


@pytest.mark.parametrize("d", [8, 40, 64, 72, 80, 96, 112, 128, 160, 256])
def test_any_head(d):
    check(problem(1, 1, 1, rows=18, keys=19, d=d, dtype=torch.float32), tile=None)
    padded = sum(widths(d))
    assert d <= padded < 1.34 * max(d, 12)


LENS, SOME = torch.tensor([17, 0]), normal(2, 2, 20, 33, seed=5) > -0.3
WAYS = {
    "causal": {"causal": True},
    "more queries than keys, causal": {"causal": True, "rows": 40, "keys": 9},
    "lengths": {"key_lens": LENS},
    "lengths of 32 bits, beyond what there is": {"key_lens": torch.tensor([99, -3], dtype=torch.int32)},
    "mask": {"attn_mask": SOME},
    "mask by key": {"attn_mask": SOME[:, :1, :1]},
    "mask by query": {"attn_mask": SOME[:1, :1, :, :1]},
    "mask that leaves nothing": {"attn_mask": SOME & (torch.arange(20) != 2)[:, None]},
    "mask that begins with nothing": {"attn_mask": torch.arange(33) > 18},
    "bias": {"attn_mask": normal(2, 2, 20, 33, seed=6)},
    "bias laid out by query": {"attn_mask": normal(2, 1, 33, 20, seed=6, dtype=torch.float32).mT},
    "bias by key": {"attn_mask": normal(33, seed=6, dtype=torch.float32)},
    "bias that excludes": {"attn_mask": torch.zeros(33).masked_fill(torch.arange(33) < 20, -torch.inf)},
    "scale": {"scale": 2.3},
    "grouped": {"heads": 4},
    "all at once": {"attn_mask": SOME, "key_lens": LENS, "causal": True, "kv_heads": 1},
}


@pytest.mark.parametrize("way", WAYS)
def test_masks_and_groups(way):
    check(problem(**{"heads": 2, "kv_heads": 2, "rows": 20, "keys": 33, "d": 16, "dtype": torch.float32} | WAYS[way]))


def test_the_lowest_bias_is_a_number():
    """What finfo.min leaves are equal weights, as in PyTorch's attention; and -inf leaves nothing."""
    of = problem(
        1, 1, 1, rows=3, keys=20, d=8, dtype=torch.float32, attn_mask=torch.full((20,), torch.finfo(torch.float32).min)
    )
    assert error(solved(of)[0], of.tensors[2].mean(2, keepdim=True).expand(-1, -1, 3, -1)) < 1e-6


@pytest.mark.parametrize("layout", ["tokens first", "fused", "last first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(layout, dtype):
    check(problem(1, 2, 2, rows=9, keys=17, d=16, layout=layout, dtype=dtype))


def test_repeated_and_unaligned_tensors_are_read_as_they_are():
    of = problem(rows=9, keys=17, d=16, dtype=torch.float32)
    q, k, v, tq, tk, tv = of.tensors
    shifted = torch.empty(q.numel() + 1)[1:].view_as(q).copy_(q)
    check(Problem((shifted, k[:1].expand(2, -1, -1, -1), v[:, :1].expand(-1, 4, -1, -1), tq, tk, tv)))


def test_what_does_not_count_is_never_looked_at():
    of = problem(rows=9, keys=40, d=16, dtype=torch.float32, key_lens=torch.tensor([35, 16]))
    for got, want in zip(solved(of.poisoned(), SMALL), truth(of), strict=True):
        assert error(got, want) < 2e-6


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_peaky_softmax(dtype):
    """One key has nearly all weight, and which one changes as the keys pass by."""
    check(problem(1, 2, 2, rows=20, keys=80, d=16, dtype=dtype, scale=12.0), tolerance=max(2e-5, TOLERANCE[dtype]))


def test_linear_in_the_tangents():
    a, b = (problem(1, 2, 2, rows=9, keys=33, d=16, dtype=torch.float32, seed=seed) for seed in (1, 2))
    primals = a.tensors[:3]
    both = Problem((*primals, *(2 * x - 3 * y for x, y in zip(a.tensors[3:], b.tensors[3:], strict=True))))
    one, other = solved(a, SMALL)[1], solved(Problem((*primals, *b.tensors[3:])), SMALL)[1]
    assert error(solved(both, SMALL)[1], 2 * one.double() - 3 * other.double()) < 2e-6


@pytest.mark.parametrize("tangents", TANGENTS)
def test_absent_is_zero(tangents):
    of = problem(1, 2, 2, rows=9, keys=33, d=16, dtype=torch.float32, tangents=tangents)
    zeros = tuple(torch.zeros_like(x) if t is None else t for x, t in zip(of.tensors[:3], of.tensors[3:], strict=True))
    for got, want in zip(solved(of, SMALL), solved(Problem((*of.tensors[:3], *zeros)), SMALL), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_parts_of_the_keys_merge_to_the_whole():
    of = problem(1, 2, 2, rows=9, keys=50, d=16, dtype=torch.bfloat16)
    parts = []
    for here in (slice(0, 10), slice(10, 17), slice(17, 50)):
        part = Problem(tuple(x if i in (0, 3) else x[:, :, here] for i, x in enumerate(of.tensors)))
        parts.append(solved(part, SMALL, out_dtype=torch.float32))
    for got, want in zip(merge(parts), truth(of), strict=True):
        assert error(got, want) < 6e-3


def shared_mean(strength: float) -> Problem:
    """Keys, and the tangents of queries, that have a direction in common."""
    of = problem(1, 1, 1, rows=128, keys=512, d=64, dtype=torch.float32)
    common = strength * normal(64, seed=77, dtype=torch.float32)
    q, k, v, tq, tk, tv = of.tensors
    return Problem(tuple(x.bfloat16() for x in (q, k + common, v, tq + common, tk, tv)))


@pytest.mark.parametrize("strength", [0.0, 2.0, 8.0])
def test_centring_removes_cancellation(strength):
    """Weights and H are rounded to bfloat16 before each product, as on the chip: not centred, H V and mu O cancel too late."""
    of = shared_mean(strength)
    assert error(solved(of)[1], truth(of)[1]) < 1e-2
    if strength == 8:
        assert error(solved(of, centred=False)[1], truth(of)[1]) > 0.05


@pytest.mark.parametrize("tangents", ["111", "100"])
def test_float16_does_not_overflow(tangents):
    """H passes 65504 in every other row, and is small in the rest."""
    of = problem(1, 1, 1, rows=20, keys=40, d=16, dtype=torch.float16, tangents=tangents)
    q, k, v, tq, tk, tv = of.tensors
    steep = tq * torch.where(torch.arange(20) % 2 == 0, 2.0, 2.0**14)[:, None].half()
    q, k = q / 64, 64 * k
    of = Problem((q, k, v, steep, tk, None if tv is None else 4096 * tv))  # so large that its share is seen
    p, ts = (q.double() @ k.double().mT / 4).softmax(-1), steep.double() @ k.double().mT / 4
    assert (p * (ts - (p * ts).sum(-1, keepdim=True))).abs().max() > 2 * 65504
    got, want = solved(of, SMALL, out_dtype=torch.float32)[1], truth(of)[1]
    for row in range(20):  # each, so that the steep do not hide the others
        assert error(got[:, :, row], want[:, :, row]) < 5e-3


@st.composite
def problems(draw) -> tuple[Problem, Tile]:
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2)]))
    batch, rows, keys = draw(st.integers(1, 2)), draw(st.integers(1, 40)), draw(st.integers(1, 40))
    heads, how = kv_heads * group, {}
    if draw(st.booleans()):
        shape = [n if draw(st.booleans()) else 1 for n in (batch, heads, rows, keys)]
        mask = normal(*shape, seed=draw(st.integers(0, 99)))
        how["attn_mask"] = mask > -0.5 if draw(st.booleans()) else mask.float()
    if draw(st.booleans()):
        how["key_lens"] = torch.tensor(draw(st.lists(st.integers(0, keys), min_size=batch, max_size=batch)))
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    of = problem(
        batch, heads, kv_heads, rows, keys, d=draw(st.sampled_from([8, 16, 24, 40, 64])), 
        tangents=draw(st.sampled_from(TANGENTS)),
        dtype=dtype, layout=draw(st.sampled_from(["heads first", "tokens first", "fused"])), seed=draw(st.integers(0, 99)),
        causal=draw(st.booleans()), **how,
    )  # fmt: skip
    return of, draw(st.sampled_from([SMALL, Tile(16, 16, 1, 1), Tile(16, 32, 1, 1)]))


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(problems())
def test_random_problems(found):
    of, tile = found
    exact = truth(of)
    for got, want in zip(solved(of, tile), exact, strict=True):
        where = want.isfinite()
        size = want[where].norm() if want is not exact[1] else (want[where].norm() ** 2 + exact[0].norm() ** 2) ** 0.5
        assert torch.equal(got.isfinite(), where)
        assert (got[where].double() - want[where]).norm() < 2 * TOLERANCE[of.tensors[0].dtype] * size + 1e-6


def test_the_public_function_gets_there():
    of = problem(
        rows=9, keys=17, d=16, dtype=torch.bfloat16, layout="tokens first", kv_heads=2, attn_mask=normal(9, 17, seed=3)
    )
    got = attention_jvp(*of.tensors, **of.how, backend="triton", return_stats=True)
    for a, b in zip(got, solved(of), strict=True):
        assert torch.equal(a, b)


def test_a_tile_too_large_gives_way_to_a_smaller_one(monkeypatch):
    tried, kernel = [], launch.triton_kernel.attention_jvp

    class Scarce:
        def __getitem__(self, grid):
            def run(**given):
                tried.append((given["ROWS"], given["KEYS"]))
                if given["ROWS"] > 64:
                    raise launch.OutOfResources(300_000, 99_000, "shared memory")
                kernel[grid](**given)

            return run

    monkeypatch.setattr(launch.triton_kernel, "attention_jvp", Scarce())
    check(problem(1, 1, 1, rows=5, keys=9, d=16, dtype=torch.float16), tile=None)
    assert tried == [tile[:2] for tile in TILES["roomy"].values()] and tried[-1][0] == 64


@pytest.mark.parametrize("table", TILES)
def test_tables_have_a_tile_for_every_head(table):
    assert max(TILES[table]) == 256 and list(TILES[table]) == sorted(TILES[table])


def test_tiles_are_chosen_by_what_is_asked():
    hopper, desk, plain = 227 * 1024, 99 * 1024, {"MASKED": 0, "TMA": True}
    assert tiles(128, torch.bfloat16, plain, hopper)[0] == TILES["roomy"][128]
    assert tiles(72, torch.float16, plain | {"TMA": False}, hopper)[0] == TILES["roomy"][96]
    for dtype, heavy in ((torch.bfloat16, {"MASKED": 2}), (torch.bfloat16, {"TMA": False}), (torch.float16, {})):
        assert tiles(128, dtype, plain | heavy, hopper)[0] == TILES["roomy, heavy"][128]
    assert tiles(128, torch.bfloat16, plain, desk)[0] == TILES["small"][128]
    assert tiles(64, torch.float32, plain, hopper) == (TILES["float32"][256], LAST)


def test_the_copy_engine_reads_steps_of_16_bytes_from_an_address_of_16():
    x = torch.empty(2, 3, 8, 16, dtype=torch.float16)
    assert (
        launch._describable(x) and launch._describable(x.transpose(1, 2)) and launch._describable(x[:1, :1].expand(1, 1, 8, 16))
    )
    assert not launch._describable(x[:1].expand(2, 3, 8, 16))  # the same again, in no steps at all
    assert not launch._describable(x[..., 1:])
    assert not launch._describable(torch.empty(2, 3, 8, 12, dtype=torch.float16))
