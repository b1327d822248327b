"""Compiles every Triton kernel for GPUs that need not be there, and reads what the compiler made.

    python benchmarks/aot_report.py            all variants for sm_80, sm_90 and sm_100: a table,
                                               and benchmarks/results/aot.csv

Registers, spills and shared memory decide whether a kernel can run well; the tensor-core
instruction decides how fast. Speed itself needs a GPU: nothing here is a timing.
"""

import csv
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

if os.environ.get("TRITON_INTERPRET") == "1":
    raise RuntimeError("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from qtk_kernels import (
    hadamard_quantize,
    int4_linear,
    int8_linear,
    layer_norm_quantize,
    shift_scale_quantize,
)
from qtk_kernels import weight_only_linear as weight_only
from qtk_kernels._codes import Codes
from qtk_kernels._launch import gemm_launch

ARCHS = (80, 90, 100)
SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448}  # bytes a program may use
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
RESULTS = Path(__file__).resolve().parent / "results"

FLOATS = ("eps", "clip", "out_step", "norm", "step")
ALIGNED = ("K", "width", "stride_xm", "stride_rm", "stride_wn")  # multiples of 16 in real models


@dataclass(frozen=True)
class Variant:
    """One kernel with its compile-time parameters."""

    name: str
    kernel: Any
    types: dict[str, str]  # of pointers, "*i8" and so on; a pointer not named is None
    params: dict[str, Any]


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


def row_variants() -> list[Variant]:
    """LayerNorm and elementwise quantizers."""
    specs = {
        "w8 tensor": Codes(8), "w8 token": Codes(8, "token"), "w4 g128": Codes(4, 128, packed=True),
    }  # fmt: skip
    out = []
    for label, codes in specs.items():
        for K in (768, 4096, 8192, 32768):
            launch = codes.launch(4096, K)
            walk = launch["BLOCK_K"] < K
            q = "*u8" if codes.packed else "*i8"
            scale = {} if codes.static else {"scale_ptr": "*fp32"}
            out.append(Variant(
                f"layer_norm_quantize {label} K={K}",
                layer_norm_quantize._layer_norm_quantize_kernel,
                {"x_ptr": "*bf16", "residual_ptr": "*bf16", "weight_ptr": "*fp32",
                 "bias_ptr": "*fp32", "q_ptr": q, "emitted_ptr": "*bf16", **scale},
                {**launch, "WALK": walk},
            ))  # fmt: skip
            for activation in ("", "gelu", "gelu_tanh"):
                out.append(Variant(
                    f"{activation or 'shift_scale'}_quantize {label} K={K}",
                    shift_scale_quantize._shift_scale_quantize_kernel,
                    {"x_ptr": "*bf16", "multiplier_ptr": "*fp32", "offset_ptr": "*fp32",
                     "q_ptr": q, **scale},
                    {**launch, "ACTIVATION": activation,
                     "WALK": walk and codes.granularity == "token"},
                ))  # fmt: skip
        launch = codes.launch(4096, 4096, at_least=4096)
        out.append(Variant(
            f"hadamard_quantize {label} K=4096 block=128",
            hadamard_quantize._hadamard_quantize_kernel,
            {"x_ptr": "*bf16", "multiplier_ptr": "*fp32", "q_ptr": "*u8" if codes.packed else "*i8",
             **({} if codes.static else {"scale_ptr": "*fp32"})},
            {**launch, "STAGES": 7},
        ))  # fmt: skip
    return out


def gemm_variants() -> list[Variant]:
    """Matrix products, for a few tokens and for many."""
    out = []
    for M in (1, 32, 256, 8192):
        for group in (0, 128):
            tile = gemm_launch(M, 4096, grouped=group > 0, computed_weights=False)
            scales = {"x_scale_ptr": "*fp32", "w_scale_ptr": "*fp32", "bias_ptr": "*fp32"}
            common = {"GROUP": group, "HAS_ZERO_POINT": False, "ACTIVATION": ""}
            out.append(Variant(
                f"int8_linear M={M} g={group}", int8_linear._int8_linear_kernel,
                {"x_ptr": "*i8", "w_ptr": "*i8", "out_ptr": "*bf16", **scales},
                {**common, "QMIN": 0, "QMAX": 0, "BLOCK_K": 128, **tile},
            ))  # fmt: skip
            for packed in (False, True):
                tile4 = gemm_launch(
                    M, 4096, grouped=group > 0, computed_weights=True, computed_tokens=packed
                )
                out.append(Variant(
                    f"int4_linear W4A{4 if packed else 8} M={M} g={group}",
                    int4_linear._int4_linear_kernel,
                    {"x_ptr": "*u8" if packed else "*i8", "w_ptr": "*u8", "out_ptr": "*bf16",
                     **scales},
                    {**common, "X_PACKED": packed, "BYTES": 64, **tile4},
                ))  # fmt: skip
            for packed in (False, True):
                tile16 = gemm_launch(M, 4096, grouped=group > 0, computed_weights=True, wide=True)
                out.append(Variant(
                    f"weight_only_linear W{4 if packed else 8}A16 M={M} g={group}",
                    weight_only._weight_only_linear_kernel,
                    {"x_ptr": "*bf16", "w_ptr": "*u8" if packed else "*i8",
                     "w_scale_ptr": "*fp32", "bias_ptr": "*bf16", "out_ptr": "*bf16"},
                    {"GROUP": group, "PACKED": packed, "HAS_ZERO_POINT": False,
                     "DTYPE": tl.bfloat16, "WIDTH": 64, **tile16},
                ))  # fmt: skip
    tile = gemm_launch(8192, 4096, grouped=False, computed_weights=False)
    out.append(Variant(
        "int8_linear gelu requantize M=8192", int8_linear._int8_linear_kernel,
        {"x_ptr": "*i8", "w_ptr": "*i8", "out_ptr": "*i8", "w_scale_ptr": "*fp32",
         "bias_ptr": "*fp32"},
        {"GROUP": 0, "HAS_ZERO_POINT": True, "ACTIVATION": "gelu", "QMIN": -128, "QMAX": 127,
         "BLOCK_K": 128, **tile},
    ))  # fmt: skip
    return out


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
    options["enable_fp_fusion"] = variant.kernel is weight_only._weight_only_linear_kernel
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def report(variant: Variant, arch: int) -> Row:
    """Compiles and measures one variant."""
    compiled = compile_for(variant, arch)
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder) / "k.cubin", Path(folder) / "k.ptx"
        cubin.write_bytes(compiled.asm["cubin"])
        ptx.write_text(compiled.asm["ptx"])
        usage = _run(BIN / "cuobjdump", "-res-usage", cubin)
        sass = _run(BIN / "cuobjdump", "-sass", cubin)
        assembler = get_ptxas(arch).path
        suffix = "a" if arch >= 90 else ""
        log = _run(assembler, "-v", f"--gpu-name=sm_{arch}{suffix}", ptx, "-o", Path(folder) / "o")
    ops = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)", sass, re.M)
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", log)]
    return Row(
        variant=variant.name,
        arch=arch,
        registers=int(re.findall(r"REG:(\d+)", usage)[0]),
        spill_bytes=sum(spills),
        shared=compiled.metadata.shared,
        tensor_core=tensor_core(compiled.asm["ptx"]),
        i2f=sum(op.startswith("I2F") for op in ops),
        f2i=sum(op.startswith("F2I") for op in ops),
        mufu=sum(op.startswith("MUFU") for op in ops),
        instructions=len(ops),
        serialized="wgmma" in log and "serializ" in log,
    )


def tensor_core(ptx: str) -> str:
    """The matrix instructions in the PTX, shortest form."""
    found = set(re.findall(r"(wgmma\.mma_async\S*|tcgen05\.mma\S*|mma\.sync\S*)", ptx))
    return " ".join(sorted(re.sub(r"\.sync\.aligned|\.row\.col|\.cta_group::1", "", f).rstrip(";")
                           for f in found))  # fmt: skip


def _run(*command: Any) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def main() -> None:
    rows = []
    for variant in [*row_variants(), *gemm_variants()]:
        for arch in ARCHS:
            row = report(variant, arch)
            rows.append(row)
            print(
                f"{row.variant:44} sm_{arch:<4} {row.registers:4} regs {row.spill_bytes:5} spilled "
                f"{row.shared:7} shared {row.i2f:4} I2F {row.f2i:3} F2I {row.mufu:3} MUFU "
                f"{row.instructions:5} SASS  {row.tensor_core}"
                f"{'  SERIALIZED' if row.serialized else ''}",
                flush=True,
            )
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / "aot.csv").open("w", newline="") as file:
        names = [f.name for f in fields(Row)]
        writer = csv.DictWriter(file, ["triton", "torch", *names])
        writer.writeheader()
        versions = {"triton": triton.__version__, "torch": torch.__version__.split("+")[0]}
        writer.writerows({**versions, **asdict(row)} for row in rows)


if __name__ == "__main__":
    main()
