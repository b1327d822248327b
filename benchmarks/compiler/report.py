"""Compiles every Triton kernel for GPUs that need not be there, and reads what the compiler made.

    python -m benchmarks.compiler.report            all variants for sm_80, sm_90 and sm_100: a
                                                    table, and benchmarks/results/aot.csv
    python -m benchmarks.compiler.report 90 int8    for sm_90 only, and variants of that name

Every row is written once it is known; rows of other variants and devices stay as they were.

Registers, spills, shared memory and occupancy decide whether a kernel can run well; the tensor-core
instruction decides how fast, and the instructions that are issued beside it how close to that it
can come. Speed itself needs a GPU: nothing here is a timing.

"loop" counts the instructions of the innermost loop that multiplies matrices; "per element" is, for
matrix products, those instructions times threads over weights read (for 1024 products), and for row
kernels all instructions times threads over elements, but for the subroutines after the end that
exact divisions call for subnormal numbers. "unpack" is the ALU's instructions (logic, shifts and
permutes) in that loop for four weights, those for addresses included; shifts that the compiler
gives to the multiply-add pipe are not.
"""

import csv
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

if os.environ.get("TRITON_INTERPRET") == "1":
    raise RuntimeError("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from benchmarks.compiler.disassembly import (
    Instruction,
    before_the_end,
    innermost,
    instructions,
    tensor_core,
)
from benchmarks.compiler.flash_attention import flash_attention_kernel
from benchmarks.compiler.variants import Variant, gemm_variants, only_on, row_variants
from benchmarks.result import COMMIT, RESULTS
from qtk_kernels._gemv import gemv_floats_kernel
from qtk_kernels.layer_norm_quantize import _layer_norm_quantize_kernel
from qtk_kernels.weight_only_linear import _weight_only_linear_kernel

ARCHS = (80, 90, 100)
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TABLE = RESULTS / "aot.csv"

FLOATS = ("eps", "clip", "out_step", "norm", "step")
ALIGNED = (
    "K",
    "N",
    "width",
    "words",
    "stride_xm",
    "stride_rm",
    "stride_wn",
)  # multiples of 16 in models
UNPACKING = ("LOP3", "PRMT", "SHF", "SHL", "SHR", "I2F", "I2I", "SGXT")  # of the ALU pipe
REGISTERS, WARPS, BLOCKS = 65536, 64, 32  # of a processor, from sm_80 on
PER_SM = {80: 167936, 90: 233472, 100: 233472}  # bytes of shared memory of a processor


@dataclass(frozen=True)
class Row:
    """What the compiler made of a variant."""

    variant: str
    arch: int
    registers: int
    spill_bytes: int
    shared: int
    tensor_core: str  # the matrix instruction
    i2f: int
    f2i: int
    mufu: int
    instructions: int
    serialized: bool  # ptxas warned that it waits after each wgmma
    occupancy: float  # share of a processor's warps that fit
    wide_loads: int  # of 16 bytes a thread, cp.async included
    narrow_loads: int  # of global memory, of less
    loop: int  # instructions of the innermost loop with a matrix instruction, 0 without
    loop_i2f: int
    per_element: float
    unpack: float


COLUMNS = ["triton", "torch", "commit", *(field.name for field in fields(Row))]


def compile_for(variant: Variant, arch: int) -> Any:
    """The compiled kernel of Triton; needs no GPU."""
    options = {k: v for k, v in variant.params.items() if k in ("num_warps", "num_stages")}
    signature, constexprs, attrs = {}, {}, {}
    for i, name in enumerate(variant.kernel.arg_names):
        if name in variant.types:
            signature[name] = variant.types[name]
        elif name in variant.params or name.endswith("_ptr"):
            signature[name] = "constexpr"
            constexprs[(i,)] = variant.params.get(name)
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
        if name in variant.types or name in ALIGNED:
            attrs[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(variant.kernel, signature, constexprs, attrs)
    fused = (
        _weight_only_linear_kernel,
        gemv_floats_kernel,
        _layer_norm_quantize_kernel,
        flash_attention_kernel,  # as anybody would compile it
    )
    options["enable_fp_fusion"] = variant.kernel in fused or variant.params.get("KIND") == "float"
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def report(variant: Variant, arch: int) -> Row:
    """Compiles and measures one variant."""
    compiled = compile_for(variant, arch)
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder) / "k.cubin", Path(folder) / "k.ptx"
        cubin.write_bytes(compiled.asm["cubin"])
        ptx.write_text(compiled.asm["ptx"])
        usage = run(BIN / "cuobjdump", "-res-usage", cubin)
        code = instructions(run(BIN / "cuobjdump", "-sass", cubin))
        assembler = get_ptxas(arch).path
        suffix = "a" if arch >= 90 else ""
        log = run(assembler, "-v", f"--gpu-name=sm_{arch}{suffix}", ptx, "-o", Path(folder) / "o")
    ops, loop = operations(code), operations(innermost(code))
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", log)]
    registers = int(re.findall(r"REG:(\d+)", usage)[0])
    # beside warps that multiply there may be four that copy
    warps, mine = compiled.metadata.num_warps, variant.params["num_warps"]
    threads = 32 * (warps - 4 if warps > mine else mine)
    loads = [op for op in ops if op.startswith(("LDG", "LDGSTS"))]
    wide = sum(".128" in op for op in loads)
    unpacking = sum(op.startswith(UNPACKING) for op in loop)
    return Row(
        variant=variant.name,
        arch=arch,
        registers=registers,
        spill_bytes=sum(spills),
        shared=compiled.metadata.shared,
        tensor_core=tensor_core(compiled.asm["ptx"]),
        i2f=sum(op.startswith("I2F") for op in ops),
        f2i=sum(op.startswith("F2I") for op in ops),
        mufu=sum(op.startswith("MUFU") for op in ops),
        instructions=len(ops),
        serialized="wgmma" in log and "serializ" in log,
        occupancy=occupancy(registers, compiled.metadata.shared, 32 * warps, arch),
        wide_loads=wide,
        narrow_loads=len(loads) - wide,
        loop=len(loop),
        loop_i2f=sum(op.startswith("I2F") for op in loop),
        per_element=round((len(loop) or before_the_end(code)) * threads / elements(variant), 2),
        unpack=round(4 * unpacking * threads / weights(variant), 2) if loop else 0.0,
    )


def operations(code: list[Instruction]) -> list[str]:
    return [op for _, op, _ in code]


def occupancy(registers: int, shared: int, threads: int, arch: int) -> float:
    """Warps that a processor holds over those it could, by registers and shared memory."""
    warps = threads // 32
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32 * warps)
    by_shared = PER_SM[arch] // (shared + 1024)  # each program costs one kilobyte more
    return round(min(by_registers, by_shared, WARPS // warps, BLOCKS) * warps / WARPS, 3)


def weights(variant: Variant) -> int:
    """Weights that one pass of the loop reads; 1 for kernels without weights."""
    p = variant.params
    width = 2 * p["BYTES"] if "BYTES" in p else p.get("WIDTH", p.get("BLOCK_K", 1))
    return p.get("BLOCK_N", 1) * width * (2 if p.get("PACKED") and "WIDTH" in p else 1)


def elements(variant: Variant) -> float:
    """What `per_element` divides by: thousands of products in a loop, or elements of a tile."""
    p = variant.params
    if "BLOCK_M" in p:
        return weights(variant) * p["BLOCK_M"] / 1024
    if "SPLIT_K" in p:
        return p["BLOCK_N"]
    if "LEAST" in p:  # of q, k and v
        return 3 * p["ROWS"] * p["BLOCK_D"]
    if "WORDS" in p:  # eight weights each
        return p["ROWS"] * p["BLOCK_N"] * p["WORDS"] / 128
    lanes = p["BLOCK_K"] if "BLOCK_K" in p else p["PART"] * p["PARTS"]
    return p["ROWS"] * min(lanes, int(re.findall(r"K=(\d+)", variant.name)[0]))


def run(*command: Any) -> str:
    """What a program says."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


@cache
def _variants() -> list[Variant]:
    return [*row_variants(), *gemm_variants()]


def _report(job: tuple[int, int]) -> Row:
    index, arch = job
    return report(_variants()[index], arch)


def _write(found: dict[tuple[str, int], dict[str, Any]]) -> None:
    """The table, in the order of the variants; rows of variants that are no more go."""
    order = {variant.name: i for i, variant in enumerate(_variants())}
    keys = sorted((key for key in found if key[0] in order), key=lambda k: (k[1], order[k[0]]))
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="unknown")
        writer.writeheader()
        writer.writerows(found[key] for key in keys)


def main() -> None:
    archs = [int(arg) for arg in sys.argv[1:] if arg.isdigit()] or list(ARCHS)
    names = [arg for arg in sys.argv[1:] if not arg.isdigit()]
    wanted = [i for i, v in enumerate(_variants()) if not names or any(n in v.name for n in names)]
    found: dict[tuple[str, int], dict[str, Any]] = {}
    if TABLE.exists():
        with TABLE.open(newline="") as file:
            old = [row for row in csv.DictReader(file) if {"commit", *row} == set(COLUMNS)]
        found = {(row["variant"], int(row["arch"])): row for row in old}
    torch_version = torch.__version__.split("+")[0]
    made = {"triton": triton.__version__, "torch": torch_version, "commit": COMMIT}
    RESULTS.mkdir(exist_ok=True)
    # sm_80 has no float8_e4m3fn
    jobs = [
        (i, arch) for arch in archs for i in wanted
        if (arch != 80 or "*fp8e4nv" not in _variants()[i].types.values())
        and arch in (only_on(_variants()[i].name) or ARCHS)
    ]  # fmt: skip
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for row in pool.map(_report, jobs):
            found[row.variant, row.arch] = {**made, **asdict(row)}
            _write(found)
            print(
                f"{row.variant:44} sm_{row.arch:<4} {row.registers:4} regs "
                f"{row.spill_bytes:5} spilled "
                f"{row.shared:7} shared {row.i2f:4} I2F {row.f2i:3} F2I {row.mufu:3} MUFU "
                f"{row.instructions:5} SASS {row.loop:5} in loop {row.per_element:7} per element "
                f"{row.occupancy:5} occupied  {row.tensor_core}"
                f"{'  SERIALIZED' if row.serialized else ''}",
                flush=True,
            )


if __name__ == "__main__":
    main()
