"""The public function and its reference in plain PyTorch, against float64 and the definition."""

import importlib
import sys

import pytest
import torch
import torch.nn.functional as F
from attending import F64, TANGENTS, Problem, error, normal, problem, truth
from stepdistill_kernels import attention_jvp, launch, merge, reference
from stepdistill_kernels.attention_jvp import fused

SEEN = normal(2, 4, 5, 7, seed=1) > -0.5
WAYS = {
    "plain": {},
    "scale": {"scale": 0.7},
    "grouped": {"kv_heads": 2},
    "causal": {"causal": True},
    "lengths": {"key_lens": torch.tensor([4, 7])},
    "no key": {"key_lens": torch.tensor([0, 3])},
    "mask": {"attn_mask": SEEN},
    "mask by key": {"attn_mask": SEEN[:, :1, :1]},
    "mask that leaves nothing": {"attn_mask": SEEN & (torch.arange(5) != 2)[:, None]},
    "bias": {"attn_mask": normal(2, 1, 5, 7, seed=2)},
    "bias of a few dimensions": {"attn_mask": normal(5, 7, seed=2)},
    "all at once": {"attn_mask": SEEN, "key_lens": torch.tensor([6, 2]), "causal": True, "kv_heads": 1, "scale": 1.3},
}


def solved(of: Problem, backend="reference", **how):
    return attention_jvp(*of.tensors, **of.how, backend=backend, **how)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tangents", TANGENTS)
def test_reference_is_the_definition(way, tangents):
    of = problem(tangents=tangents, **WAYS[way])
    for got, want in zip(solved(of, return_stats=True), truth(of), strict=True):
        assert error(got, want) < 1e-13


@pytest.mark.parametrize("workspace", [1, 3 * 40, 10**9])
def test_chunks_of_keys_change_nothing(workspace):
    """One key at a time, three, or all."""
    of = problem(attn_mask=SEEN, key_lens=torch.tensor([6, 0]), causal=True)
    how = {"attn_mask": SEEN, "key_lens": torch.tensor([6, 0]), "scale": 8**-0.5, "causal": True}
    for got, want in zip(reference.attention_jvp(*of.tensors, **how, workspace=workspace), truth(of), strict=True):
        assert error(got, want) < 1e-13


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_reference_computes_in_float32_at_least(dtype):
    of = problem(dtype=dtype, rows=9, keys=40, d=16)
    o, to, lse, mu = solved(of, return_stats=True)
    assert o.dtype == to.dtype == dtype and lse.dtype == mu.dtype == torch.float32
    exact = truth(of)
    assert (
        error(o, exact[0]) < 0.6 * torch.finfo(dtype).eps + 1e-6 and error(to, exact[1]) < 0.6 * torch.finfo(dtype).eps + 1e-6
    )
    o, to = solved(of, out_dtype=torch.float32)
    assert o.dtype == torch.float32 and error(o, exact[0]) < 1e-6 and error(to, exact[1]) < 1e-6


def test_what_does_not_count_is_never_looked_at():
    of = problem(key_lens=torch.tensor([4, 0]))
    for got, want in zip(solved(of.poisoned(), return_stats=True), solved(of, return_stats=True), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("layout", ["heads first", "tokens first", "fused", "last first"])
def test_results_lie_in_memory_as_queries_do(layout):
    of = problem(layout=layout)
    o, to = solved(of)
    assert error(to, truth(of)[1]) < 1e-13
    for x in (o, to):
        joined = x.transpose(1, 2).flatten(2)
        assert (joined.data_ptr() == x.data_ptr()) == (layout in ("tokens first", "fused"))


@pytest.mark.parametrize("splits", [(3, 4), (1, 1, 5), (7,)])
def test_parts_of_the_keys_merge_to_the_whole(splits):
    of = problem(key_lens=None, kv_heads=2)
    parts, first = [], 0
    for n in splits:
        here = slice(first, first + n)
        some = [x if i in (0, 3) else x[:, :, here] for i, x in enumerate(of.tensors)]
        parts.append(attention_jvp(*some, enable_gqa=True, return_stats=True))
        first += n
    for order in (parts, parts[::-1]):
        for got, want in zip(merge(order), truth(of), strict=True):
            assert error(got, want) < 1e-13


def test_a_part_without_keys_adds_nothing():
    of = problem(key_lens=torch.tensor([3, 0]))
    whole = solved(of, return_stats=True)
    nothing = solved(problem(key_lens=torch.tensor([0, 0])), return_stats=True)
    for got, want in zip(merge([nothing, whole]), whole, strict=True):
        assert error(got, want) < 1e-13 and not got.isnan().any()


def test_mu_is_the_derivative_of_the_softmaxs_sum():
    of = problem()
    q, k, v, tq, tk, _ = of.tensors
    ahead, behind = (attention_jvp(q + h * tq, k + h * tk, v, return_stats=True)[2] for h in (1e-5, -1e-5))
    assert error(solved(of, return_stats=True)[3], (ahead - behind) / 2e-5) < 1e-8


@pytest.mark.parametrize("way", WAYS)
def test_gradient_is_that_of_the_definition(way):
    of = problem(**WAYS[way])
    leaves = [x.clone().requires_grad_() for x in of.tensors[:3]]
    o, _ = attention_jvp(*leaves, *of.tensors[3:], **of.how)
    probe = normal(*o.shape, seed=9)
    got = torch.autograd.grad((o * probe).sum(), leaves)
    want = torch.autograd.grad((truth(Problem((*leaves, None, None, None), of.how))[0] * probe).sum(), leaves)
    for a, b in zip(got, want, strict=True):
        assert error(a, b) < 1e-12


def test_the_derivative_has_no_gradient_and_says_so():
    of = problem()
    q = of.tensors[0].clone().requires_grad_()
    o, to = attention_jvp(q, *of.tensors[1:])
    with pytest.raises(RuntimeError, match="only o has a gradient"):
        (o + to).sum().backward()
    o, to = attention_jvp(q, *of.tensors[1:])
    (o * to.detach()).sum().backward()
    assert q.grad is not None


def test_nothing_is_defined_when_the_folder_is_imported_by_its_own_name():
    """As transformers does where the checkout can be imported from, to see the version of Hugging Face's `kernels`."""
    folder = importlib.import_module("kernels")
    assert folder.__version__ and not hasattr(folder, "attention_jvp") and "kernels.attention_jvp" not in sys.modules


def test_it_is_a_proper_operator():
    """Schema, fake implementation and dispatch, by PyTorch's own checks; and as part of a compiled function."""
    of = problem(dtype=torch.float32, layout="tokens first")
    op = torch.ops.stepdistill.attention_jvp.default
    torch.library.opcheck(op, (*of.tensors, SEEN, torch.tensor([4, 7]), 0.3, True, torch.float32, "auto"))
    torch._dynamo.reset()
    once = torch.compile(lambda *x: attention_jvp(*x)[1] * 2, backend="aot_eager", fullgraph=True)
    assert torch.equal(once(*of.tensors), attention_jvp(*of.tensors)[1] * 2)


WRONG = {
    "backend": (lambda q, k, v: attention_jvp(q, k, v, backend="cuda"), "auto, triton, reference"),
    "dimensions": (lambda q, k, v: attention_jvp(q[0], k, v), r"\[B, H, N, D\], not \[4, 5, 8\]"),
    "integers": (lambda q, k, v: attention_jvp(q.long(), k.long(), v.long()), "floating-point"),
    "dtypes": (lambda q, k, v: attention_jvp(q, k.float(), v), "k is torch.float32 on cpu, q torch.float64"),
    "tangent's dtype": (lambda q, k, v: attention_jvp(q, k, v, tv=v.float()), "tv is torch.float32"),
    "keys": (lambda q, k, v: attention_jvp(q, k[:, :, 1:], v), "do not fit"),
    "tangent's shape": (lambda q, k, v: attention_jvp(q, k, v, tk=k[:1]), r"tk \[1, 4, 7, 8\] has not the shape"),
    "heads": (lambda q, k, v: attention_jvp(q, k[:, :2], v[:, :2]), "4 heads of q and 2 of k"),
    "groups": (lambda q, k, v: attention_jvp(q, k[:, :3], v[:, :3], enable_gqa=True), "4 heads of q and 3 of k"),
    "mask": (lambda q, k, v: attention_jvp(q, k, v, attn_mask=torch.zeros(5, 6)), r"attn_mask \[5, 6\] cannot"),
    "mask's dtype": (lambda q, k, v: attention_jvp(q, k, v, attn_mask=torch.zeros(5, 7).long()), "boolean or added"),
    "mask's gradient": (lambda q, k, v: attention_jvp(q, k, v, attn_mask=torch.zeros(5, 7).requires_grad_()), "detach it"),
    "lengths": (lambda q, k, v: attention_jvp(q, k, v, key_lens=torch.tensor([1.0, 2.0])), r"key_lens is \[2\] integers"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_refused(what):
    call, told = WRONG[what]
    with pytest.raises(ValueError, match=told):
        call(*problem().tensors[:3])


def test_the_kernel_is_never_silently_replaced(monkeypatch):
    of = problem()
    with pytest.raises(ValueError, match=r"not in torch\.float64"):
        solved(of, backend="triton")
    of = problem(dtype=torch.float32)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(ValueError, match="on the CPU it runs only"):
        solved(of, backend="triton")


@pytest.mark.parametrize(
    ("change", "why"),
    [({"d": 257}, "from 1 to 256"), ({"keys": 0}, "nothing to compute"), ({"scale": -1.0}, "scale is above 0")],
)
def test_what_the_kernel_cannot_compute_it_says(change, why):
    of = problem(dtype=torch.float32, **change)
    with pytest.raises(ValueError, match=why):
        solved(of, backend="triton")
    for got, want in zip(solved(of, "auto"), truth(of), strict=False):
        assert error(got, want) < 1e-5


def test_a_gpu_without_the_kernel_is_told_of(monkeypatch):
    """`auto` falls back aloud: on a GPU the reference is slow."""
    q, k, v = (torch.empty(1, 1, 4, 8, device="meta") for _ in range(3))
    with pytest.warns(UserWarning, match="plain PyTorch.*runs on CUDA devices, not on meta"):
        assert not fused(q, k, v, 1.0, "auto")


def test_stock_attention_agrees():
    of = problem(tangents="000", attn_mask=SEEN)
    assert error(solved(of)[0], F.scaled_dot_product_attention(*of.tensors[:3], attn_mask=SEEN)) < 1e-13
    assert not solved(of)[1].any() and solved(of)[1].dtype == F64
