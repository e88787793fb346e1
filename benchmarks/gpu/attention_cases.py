"""What attention is measured on: shapes of real networks, their random inputs, and the truth in float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from measure import Gpu, Host, Work, first_ms
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """A row of the benchmark. `tangents` tells of which of q, k and v there are any: "100" is attention to a constant text."""

    name: str
    heads: int
    queries: int
    keys: int
    dim: int
    tangents: str = "111"
    dtype: str = "bfloat16"
    batch: int = 1
    kv_heads: int = 0  # 0: as many as heads
    causal: bool = False
    lens: tuple[int, ...] = ()  # keys that count, by sample; (): all
    tokens_first: bool = False  # in memory [B, N, H, D], as diffusers has it
    common: float = 0.0  # times a normal vector that is added to every row of k and tq

    @property
    def kv(self) -> int:
        return self.kv_heads or self.heads

    @property
    def plain(self) -> bool:
        """No mask, as many heads everywhere, ordinary inputs: a shape and nothing else."""
        return not (self.causal or self.lens or self.kv_heads or self.tokens_first or self.common)

    @property
    def cross(self) -> bool:
        return self.queries != self.keys

    @property
    def products(self) -> int:
        """Matrix products that the derivative needs, the value's two included."""
        q, k, v = (flag == "1" for flag in self.tangents)
        return 2 + q + k + v + (q or k)

    def tflop(self, products: int) -> float:
        """Of so many products, each 2 D operations for every query and key that see each other."""
        n, m = self.queries, self.keys
        seen = sum(self.lens) * n if self.lens else self.batch * n * m
        if self.causal:
            seen = self.batch * sum(min(i + 1, m) for i in range(n))
        return products * 2 * self.dim * self.heads * seen / 1e12

    @property
    def bytes(self) -> int:
        """Each tensor read or written once: q, o and `to`, k, v, and the tangents that there are."""
        queries, keys = self.batch * self.heads * self.queries, self.batch * self.kv * self.keys
        q, k, v = (flag == "1" for flag in self.tangents)
        return (queries * (3 + q) + keys * (2 + k + v)) * self.dim * torch.finfo(getattr(torch, self.dtype)).bits // 8

    def toy(self) -> Case:
        """The same case, small enough for any machine."""
        lens = tuple(max(1, n // 256) for n in self.lens)
        queries, keys = (min(n, max(17, n // 256)) for n in (self.queries, self.keys))
        return replace(self, queries=queries, keys=keys, heads=4, kv_heads=2 * bool(self.kv_heads), dim=8, lens=lens)


CONSTANT = ", constant k v"  # what a row's name has beyond that of the one with all tangents


def grid(tokens: int, dims: tuple[int, ...] = (64, 72, 128)) -> list[Case]:
    """Self-attention with all tangents, and with q's alone; heads as networks have them: SD3's, PixArt's, FLUX's."""
    heads = {64: 24, 72: 16, 128: 24}
    cases = [Case(f"{tokens} tokens, D {d}", heads[d], tokens, tokens, d) for d in dims]
    return [made for case in cases for made in (case, replace(case, name=case.name + CONSTANT, tangents="100"))]


LARGE = Case("4096 tokens, D 128", 24, 4096, 4096, 128)  # the one that targets are stated for
CASES = (  # those that the targets need come first: time may end before the list does
    *grid(4096, (128,)),
    Case("SDXL", 10, 4096, 4096, 64),
    Case("SDXL, 77 text tokens", 10, 4096, 77, 64, "100"),
    Case("Wan 480p, 77 text tokens", 12, 31200, 77, 128, "100"),
    Case("FLUX 1024px", 24, 4608, 4608, 128),
    *grid(4096, (64,)),
    Case("Wan 480p", 12, 31200, 31200, 128),
    Case("Wan 480p, 512 text tokens", 12, 31200, 512, 128, "100"),
    replace(LARGE, name="common direction", common=8.0),
    replace(LARGE, name="tokens before heads", tokens_first=True),
    replace(LARGE, name="causal", causal=True),
    replace(LARGE, name="padded keys", batch=2, heads=12, lens=(4096, 2900)),
    replace(LARGE, name="grouped queries", kv_heads=6),
    replace(LARGE, name="float16", dtype="float16"),
    Case("float32", 10, 4096, 4096, 64, dtype="float32"),
    *grid(4096, (72,)),
    *grid(16384),
    *grid(1024),
)


class Inputs(NamedTuple):
    q: Tensor  # [B, H, Nq, D]
    k: Tensor  # [B, Hk, Nk, D]; v too
    v: Tensor
    tq: Tensor | None
    tk: Tensor | None
    tv: Tensor | None
    key_lens: Tensor | None  # [B]

    def key_mask(self) -> Tensor | None:
        """[B, 1, 1, Nk]: which keys count."""
        if self.key_lens is None:
            return None
        return (torch.arange(self.k.shape[2], device=self.k.device) < self.key_lens[:, None])[:, None, None]


def draw(case: Case, device: torch.device) -> Inputs:
    """Normal numbers, the tangents' too: zeros would need less power, and clocks rise."""
    random = torch.Generator(device).manual_seed(0)

    def tensor(heads: int, tokens: int) -> Tensor:
        shape = (case.batch, tokens, heads, case.dim) if case.tokens_first else (case.batch, heads, tokens, case.dim)
        x = torch.randn(shape, generator=random, device=device).to(getattr(torch, case.dtype))
        return x.transpose(1, 2) if case.tokens_first else x

    q, k, v = tensor(case.heads, case.queries), tensor(case.kv, case.keys), tensor(case.kv, case.keys)
    given = [
        tensor(*size) if flag == "1" else None
        for size, flag in zip([(x.shape[1], x.shape[2]) for x in (q, k, v)], case.tangents, strict=True)
    ]
    if case.common:
        direction = torch.randn(case.dim, generator=random, device=device)
        k, given[0] = (x + (case.common * direction).to(x.dtype) for x in (k, given[0]))
    return Inputs(q, k, v, *given, torch.tensor(case.lens, device=device) if case.lens else None)


class Truth(NamedTuple):
    """Some rows of some heads, in float64."""

    heads: Tensor
    rows: Tensor
    o: Tensor
    to: Tensor

    def error(self, result: Tensor, what: str) -> float | None:
        """Relative, in the norm of these rows; None where they are not all finite."""
        want = getattr(self, what)
        found = ((result[:, self.heads][:, :, self.rows].double() - want).norm() / want.norm()).item()
        return found if found < float("inf") else None


def truth(case: Case, x: Inputs, attention_jvp: Callable[..., tuple[Tensor, Tensor]], rows: int = 128) -> Truth:
    """By the reference, on the inputs as they were rounded."""
    device = x.q.device
    heads = torch.tensor([0, case.heads - 1], device=device)
    row = torch.linspace(0, case.queries - 1, min(rows, case.queries), device=device, dtype=torch.float64).long()
    kv = heads // (case.heads // case.kv)

    def queries(t: Tensor | None) -> Tensor | None:
        return None if t is None else t[:, heads][:, :, row].double()

    def keys(t: Tensor | None) -> Tensor | None:
        return None if t is None else t[:, kv].double()

    seen = torch.arange(case.keys, device=device) <= row[:, None] if case.causal else None
    given = queries(x.q), keys(x.k), keys(x.v), queries(x.tq), keys(x.tk), keys(x.tv)
    return Truth(heads, row, *attention_jvp(*given, attn_mask=seen, key_lens=x.key_lens, backend="reference"))


def trial(on: Gpu | Host, work: Work, x: Inputs, want: Truth | None) -> dict[str, float | None]:
    """A work's first calls: how long with compilation, how much memory, how far from the truth, if it is attention."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = {"first_ms": first_ms(on, work), "peak_mb": on.peak_mb(work)}
        if want is None:
            return made
        stale = [torch.full_like(x.q, float("nan")) for _ in range(2)]
        del stale  # the results are given this memory: what is left unwritten shows
        found = zip(("o", "to"), work(), strict=False)
        return made | {f"error_{what}": want.error(result, what) for what, result in found}
