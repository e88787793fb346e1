"""Compiles variants of the kernel for a GPU that is not there, and reads off what the assembler says of them.

python -m stepdistill_kernels.offline        # the variants that matter, as a table
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import triton_kernel
from .tiles import Tile, tiles, widths

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOKENS = ("K", "V", "TK", "TV")
SHARED_MEMORY = {89: 99, 90: 227}  # KiB that a block can have, by compute capability


@dataclass(frozen=True)
class Variant:
    """What is asked of the kernel. tangents: of q, k and v, as in 111; mask: added by key or by query."""

    d: int
    dtype: str = "bf16"  # as Triton writes it
    tangents: str = "111"
    mask: str = ""  # "", "key", "query", "boolean, query"
    causal: bool = False
    lens: bool = False
    ragged: bool = True
    tma: bool = True

    def tile(self, capability: int) -> Tile:
        """The first that launch.forward would try."""
        return tiles(self.d, DTYPES[self.dtype], self.flags(), SHARED_MEMORY[capability] * 1024)[0]

    def flags(self) -> dict:
        """As launch.forward hands them to the kernel."""
        given = dict(zip(("HAS_TQ", "HAS_TK", "HAS_TV"), (bit == "1" for bit in self.tangents), strict=True))
        masked = 0 if not self.mask else 1 if self.mask == "key" else 2
        return given | {
            "MASKED": masked, "HAS_LENS": self.lens, "CAUSAL": self.causal,
            "CENTRED": True, "TMA": self.tma and not self.lens and not widths(self.d)[1], "UPCAST": False,
        }  # fmt: skip


def variants() -> list[tuple[Variant, int]]:
    """Those that matter, and the compute capabilities that they are compiled for."""
    found: list[Variant] = []
    for d in (64, 128):
        found += [Variant(d, tangents=given) for given in ("111", "100", "110", "011", "001")]
        for given in ("111", "100"):
            found += [
                Variant(d, tangents=given, ragged=False), Variant(d, tangents=given, causal=True),
                Variant(d, tangents=given, lens=True), Variant(d, tangents=given, tma=False),
                *(Variant(d, tangents=given, mask=mask) for mask in ("key", "query", "boolean, query")),
            ]  # fmt: skip
        found.append(Variant(d, dtype="fp16"))
    wide = [Variant(d) for d in (40, 72, 80, 96, 112, 256)]
    return [(x, 90) for x in found + wide] + [(Variant(d, tma=False), 89) for d in (64, 80, 128)]


@dataclass(frozen=True)
class Compiled:
    """What became of a variant; spilled bytes (stores and loads), shared memory in KiB, Hopper's matrix instructions."""

    variant: Variant
    capability: int
    tile: Tile
    registers: int
    spilled: int
    shared: float
    wgmma: int


def compiled(variant: Variant, capability: int = 90, tile: Tile | None = None) -> Compiled:
    """Compiles for a compute capability, such as 90 for sm_90a, in the table's tile or another.

    Raises:
        RuntimeError: the assembler refuses it.
    """
    tile = tile or variant.tile(capability)
    kernel = triton_kernel.attention_jvp
    flags = variant.flags()
    d0, d1 = widths(variant.d)
    fixed = flags | {"D": variant.d, "D0": d0, "D1": d1, "ROWS": tile.rows, "KEYS": tile.keys, "RAGGED": variant.ragged}
    absent = {
        "TQ": flags["HAS_TQ"],
        "TK": flags["HAS_TK"],
        "TV": flags["HAS_TV"],
        "MASK": flags["MASKED"],
        "LENS": variant.lens,
    }
    fixed |= {name: None for name, given in absent.items() if not given}
    if flags["MASKED"]:
        fixed["mask_k"] = 1  # launch.forward sees to it, and Triton makes a constant of a step of 1

    def kind(name: str) -> str:
        if name in fixed:
            return "constexpr"
        if name in ("Q", "TQ", *TOKENS):
            block = tile.keys if name in TOKENS else tile.rows
            return f"tensordesc<{variant.dtype}[1,1,{block},{d0}]>" if flags["TMA"] else f"*{variant.dtype}"
        known = {
            "LENS": "*i64",
            "LSE": "*fp32",
            "MU": "*fp32",
            "scale": "fp32",
            "OUT": f"*{variant.dtype}",
            "T_OUT": f"*{variant.dtype}",
        }
        known["MASK"] = {"key": "*fp32", "boolean, query": "*i1"}.get(variant.mask, f"*{variant.dtype}")
        return known.get(name, "i32")

    signature = {name: kind(name) for name in kernel.arg_names}
    even = re.compile(r"(t?[qkv]|out|mask)_[bhnq]")  # steps of whole heads: multiples of 16
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, of) in enumerate(signature.items())
        if of.startswith("*") or (of == "i32" and even.fullmatch(name))
    }
    constants = {(kernel.arg_names.index(name),): value for name, value in fixed.items()}
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    told = _assemble(made.asm["ptx"], f"sm_{capability}{'a' if capability >= 90 else ''}")
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", told)
    return Compiled(
        variant,
        capability,
        tile,
        int(re.search(r"Used (\d+) registers", told)[1]),
        sum(map(int, spilled.groups())),
        made.metadata.shared / 1024,
        made.asm["ptx"].count("wgmma.mma_async"),
    )


def _assemble(ptx: str, target: str) -> str:
    assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        call = [str(assembler), "-v", f"--gpu-name={target}", file.name, "-o", "/dev/null"]
        done = subprocess.run(call, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ptxas: {done.stderr.strip()}")
    return done.stderr


def table(made: list[Compiled]) -> str:
    """A page's rows, with what made them."""
    lines = [
        f"`python -m stepdistill_kernels.offline`, Triton {triton.__version__}:",
        "",
        "| D | type | tangents | besides | read by | chip | tile | warps | registers | spilled | shared memory | wgmma |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for x in made:
        v, t = x.variant, x.tile
        asked = [
            f"mask ({v.mask})" if v.mask else "",
            "causal" * v.causal,
            "key lengths" * v.lens,
            "even lengths" * (not v.ragged),
        ]
        cells = [
            v.d, v.dtype, v.tangents, ", ".join(filter(None, asked)), "descriptors" if v.flags()["TMA"] else "pointers",
            f"sm_{x.capability}", f"{t.rows} x {t.keys} x {t.stages}", t.warps, x.registers, f"{x.spilled} B",
            f"{x.shared:.0f} KiB", x.wgmma,
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table([compiled(variant, capability) for variant, capability in variants()]))
