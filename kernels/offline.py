"""Compiles variants of the kernel for a GPU that is not there, and reads off what the assembler says of them.

python -m stepdistill_kernels.offline        # the variants that matter, as JSON lines
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import triton_kernel
from .tiles import Tile, tiles, widths

TOKENS = ("K", "V", "TK", "TV")
SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB for one block, by compute capability


@dataclass(frozen=True)
class Variant:
    """What is asked of the kernel. tangents: of q, k and v, as in 111; mask: by key or by query, boolean or added."""

    d: int
    dtype: str = "bf16"  # as Triton writes it
    tangents: str = "111"
    mask: str = ""  # "", "key", "query", "boolean key", "boolean query"
    causal: bool = False
    lens: bool = False
    ragged: bool = False
    tma: bool = True

    def flags(self) -> dict:
        """As launch.forward hands them to the kernel."""
        given = dict(zip(("HAS_TQ", "HAS_TK", "HAS_TV"), (bit == "1" for bit in self.tangents), strict=True))
        masked = 0 if not self.mask else 1 if self.mask.endswith("key") else 2
        return given | {
            "MASKED": masked, "HAS_LENS": self.lens, "CAUSAL": self.causal,
            "SHIFT": True, "TMA": self.tma and not self.lens and not widths(self.d)[1], "UPCAST": False,
        }  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """What became of a variant in a tile; spills in bytes (stores and loads), shared memory in KiB."""

    variant: Variant
    tile: Tile
    registers: int
    spilled: int
    shared: float
    wgmma: int


def compile_for(variant: Variant, tile: Tile, capability: int = 90) -> Compiled:
    """Compiles for a compute capability, such as 90 for sm_90a.

    Raises:
        RuntimeError: the assembler refuses it.
    """
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
            "O": f"*{variant.dtype}",
            "TO": f"*{variant.dtype}",
        }
        known["MASK"] = "*i1" if variant.mask.startswith("boolean") else f"*{variant.dtype}"
        return known.get(name, "i32")

    signature = {name: kind(name) for name in kernel.arg_names}
    even = re.compile(r"(t?[qkv]|o|mask)_[bhnq]")  # steps of whole heads: multiples of 16
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
