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
kernels all instructions times threads over elements, but for the subroutines behind the end that
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
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from benchmarks.compiler.flash_attention import flash_attention_kernel
from benchmarks.result import COMMIT, RESULTS
from qtk_kernels import (
    _split_k,
    fp8_linear,
    hadamard_quantize,
    int4_linear,
    int8_linear,
    layer_norm_quantize,
    shift_scale_quantize,
)
from qtk_kernels import weight_only_linear as weight_only
from qtk_kernels._launch import gemm_launch
from qtk_kernels.codes import Codes, channels_of
from qtk_kernels.hadamard import split

ARCHS = (80, 90, 100)
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TABLE = RESULTS / "aot.csv"

FLOATS = ("eps", "clip", "out_step", "norm", "step")
ALIGNED = ("K", "N", "width", "stride_xm", "stride_rm", "stride_wn")  # multiples of 16 in models
MATRIX = ("HMMA", "IMMA", "QMMA", "HGMMA", "IGMMA", "QGMMA", "UTCHMMA", "UTCIMMA", "UTCQMMA")
UNPACKING = ("LOP3", "PRMT", "SHF", "SHL", "SHR", "I2F", "I2I", "SGXT")  # of the ALU pipe
REGISTERS, WARPS, BLOCKS = 65536, 64, 32  # of a processor, from sm_80 on
PER_SM = {80: 167936, 90: 233472, 100: 233472}  # bytes of shared memory of a processor


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
    occupancy: float  # share of a processor's warps that fit
    wide_loads: int  # of 16 bytes a thread, cp.async included
    narrow_loads: int  # of global memory, of less
    loop: int  # instructions of the innermost loop with a matrix instruction, 0 without
    loop_i2f: int
    per_element: float
    unpack: float


COLUMNS = ["triton", "torch", "commit", *(field.name for field in fields(Row))]


def row_variants() -> list[Variant]:
    """LayerNorm and elementwise quantizers."""
    specs = {
        "w8 tensor": Codes(8), "w8 token": Codes(8, "token"), "w4 g128": Codes(4, 128, packed=True),
        "w8 g100": Codes(8, 100),
    }  # fmt: skip
    out = []
    for label, codes in specs.items():
        for K in (768, 4096, 32768):
            launch = codes.launch(4096, K)
            walk = channels_of(launch) < K
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
        for K, block in ((4096, 128), (768, 768)):
            fused = hadamard_quantize.hadamard_launch(4096, K, block, codes)
            if fused is None:  # PyTorch rotates
                continue
            types = {"x_ptr": "*bf16", "multiplier_ptr": "*fp32", "out_multiplier_ptr": "*fp32",
                     "q_ptr": "*u8" if codes.packed else "*i8"}  # fmt: skip
            types |= {} if codes.static else {"scale_ptr": "*fp32"}
            types |= {"left_ptr": "*fp32", "right_ptr": "*fp32"} if fused["BLOCKS"] else {}
            _, f, p = split(block)
            out.append(Variant(
                f"hadamard_quantize {label} K={K} block={block} ({f}x{p})",
                hadamard_quantize._hadamard_quantize_kernel, types, fused,
            ))  # fmt: skip
    codes = Codes(8)
    for K in (768, 1024, 4096):
        launch = codes.launch(4096, K)
        out.append(Variant(
            f"layer_norm_quantize w8 tensor K={K}, no residual",
            layer_norm_quantize._layer_norm_quantize_kernel,
            {"x_ptr": "*bf16", "weight_ptr": "*fp32", "bias_ptr": "*fp32", "q_ptr": "*i8"},
            {**launch, "WALK": False},
        ))  # fmt: skip
    return out


def gemm_variants() -> list[Variant]:
    """Matrix products, for a few tokens and for many; odd groups; the second phase of a split."""
    out = []
    for M in (1, 32, 64, 256, 8192):
        for group in (0, 128):
            out += [_int8(M, group), _weight_only(M, group, False), _weight_only(M, group, True)]
            out += [_int4(M, group, packed) for packed in (False, True)]
        out.append(_fp8(M))
    out += [_int8(8192, 100), _int4(16, 100, False), _weight_only(16, 100, True)]
    requantize = {"ACTIVATION": "gelu", "QMIN": -128, "QMAX": 127}
    name = "gelu requantize M=8192"
    out += [_int8(8192, 0, name, "*i8", HAS_ZERO_POINT=True, **requantize),
            _int4(8192, 0, False, name, "*i8", **requantize)]  # fmt: skip
    for parts in ("*i32", "*fp32"):
        types = {"parts_ptr": parts, "bias_ptr": "*fp32", "out_ptr": "*bf16"}
        types |= {"x_scale_ptr": "*fp32", "w_scale_ptr": "*fp32"} if parts == "*i32" else {}
        out.append(Variant(
            f"add_parts {parts[1:]}", _split_k._add_parts_kernel, types,
            {"SPLIT_K": 8, "RIGHT_SHIFT": 4 if parts == "*i32" else 0, "ACTIVATION": "", "QMIN": 0,
             "QMAX": 0, "BLOCK_N": _split_k.BLOCK, "num_warps": 2},
        ))  # fmt: skip
    return out


SCALES = {"x_scale_ptr": "*fp32", "w_scale_ptr": "*fp32", "bias_ptr": "*fp32"}
PLAIN = {
    "EVEN": True,
    "X_GROUPS": False,
    "HAS_ZERO_POINT": False,
    "ACTIVATION": "",
    "QMIN": 0,
    "QMAX": 0,
}


def _outputs(tile: dict[str, Any], integers: bool, out: str = "*bf16") -> dict[str, str]:
    """The result, or the parts of a split sum."""
    parts = {"parts_ptr": "*i32" if integers else "*fp32"} if tile["SPLIT_K"] > 1 else {}
    return {"out_ptr": out, **parts}


def _name(op: str, M: int, group: int, tile: dict[str, Any]) -> str:
    return f"{op} M={M} g={group}" + (f" split={tile['SPLIT_K']}" if tile["SPLIT_K"] > 1 else "")


def _int8(M: int, group: int, name: str = "", out: str = "*bf16", **params: Any) -> Variant:
    tile = gemm_launch("int8_linear", M, 4096, 4096, grouped=group > 0, computed_weights=False)
    return Variant(
        f"int8_linear {name}" if name else _name("int8_linear", M, group, tile),
        int8_linear._int8_linear_kernel,
        {"x_ptr": "*i8", "w_ptr": "*i8", **SCALES, **_outputs(tile, not group, out)},
        {**PLAIN, "EVEN": group % 128 == 0, "GROUP": group, "BLOCK_K": 128, **tile, **params},
    )  # fmt: skip


def _int4(
    M: int, group: int, packed: bool, name: str = "", out: str = "*bf16", **params: Any
) -> Variant:
    op = f"int4_linear W4A{4 if packed else 8}"
    tile = gemm_launch(op, M, 4096, 4096, grouped=group > 0, weight_bits=4, computed_weights=True,
                       computed_tokens=packed)  # fmt: skip
    return Variant(
        f"{op} {name}" if name else _name(op, M, group, tile), int4_linear._int4_linear_kernel,
        {"x_ptr": "*u8" if packed else "*i8", "w_ptr": "*u8", **SCALES,
         **_outputs(tile, not group, out)},
        {**PLAIN, "GROUP": group, "X_PACKED": packed, "BYTES": 64, **tile, **params},
    )  # fmt: skip


def _weight_only(M: int, group: int, packed: bool) -> Variant:
    op = f"weight_only_linear W{4 if packed else 8}A16"
    tile = gemm_launch(op, M, 4096, 4096, grouped=group > 0, weight_bits=4 if packed else 8,
                       computed_weights=True, wide=True)  # fmt: skip
    return Variant(
        _name(op, M, group, tile), weight_only._weight_only_linear_kernel,
        {"x_ptr": "*bf16", "w_ptr": "*u8" if packed else "*i8", "w_scale_ptr": "*fp32",
         "bias_ptr": "*bf16", **_outputs(tile, False)},
        {"GROUP": group, "PACKED": packed, "EVEN": packed or group % 64 == 0,
         "HAS_ZERO_POINT": False, "DTYPE": tl.bfloat16, "WIDTH": 64, **tile},
    )  # fmt: skip


def _fp8(M: int) -> Variant:
    tile = gemm_launch("fp8_linear", M, 4096, 4096, grouped=False, computed_weights=False)
    return Variant(
        _name("fp8_linear", M, 0, tile), fp8_linear._fp8_linear_kernel,
        {"x_ptr": "*fp8e4nv", "w_ptr": "*fp8e4nv", **SCALES, **_outputs(tile, False)},
        {"ACTIVATION": "", "EVEN": True, "BLOCK_K": 128, **tile},
    )  # fmt: skip


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
        weight_only._weight_only_linear_kernel,
        layer_norm_quantize._layer_norm_quantize_kernel,
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
        usage = _run(BIN / "cuobjdump", "-res-usage", cubin)
        sass = _run(BIN / "cuobjdump", "-sass", cubin)
        assembler = get_ptxas(arch).path
        suffix = "a" if arch >= 90 else ""
        log = _run(assembler, "-v", f"--gpu-name=sm_{arch}{suffix}", ptx, "-o", Path(folder) / "o")
    ops = opcodes(sass)
    loop = matrix_loop(sass)
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", log)]
    registers = int(re.findall(r"REG:(\d+)", usage)[0])
    threads = 32 * variant.params["num_warps"]
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
        occupancy=occupancy(registers, compiled.metadata.shared, threads, arch),
        wide_loads=wide,
        narrow_loads=len(loads) - wide,
        loop=len(loop),
        loop_i2f=sum(op.startswith("I2F") for op in loop),
        per_element=round((len(loop) or last_exit(ops)) * threads / elements(variant), 2),
        unpack=round(4 * unpacking * threads / weights(variant), 2) if loop else 0.0,
    )


def opcodes(sass: str) -> list[str]:
    """Every instruction but the padding behind the end."""
    pattern = r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)"
    return [op for op in re.findall(pattern, sass, re.M) if op != "NOP"]


def last_exit(ops: list[str]) -> int:
    """Instructions before the end: behind it lie subroutines of exact division, for subnormals."""
    return len(ops) - ops[::-1].index("EXIT")


def matrix_loop(sass: str) -> list[str]:
    """The instructions of the shortest loop around a matrix instruction, none if there is none."""
    pattern = r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)([^;]*);"
    lines = [(int(at, 16), op, rest) for at, op, rest in re.findall(pattern, sass, re.M)]
    end = max(at for at, op, _ in lines if op == "EXIT")  # behind it lie waits, moved out of loops
    loops = []
    for at, op, rest in lines:
        target = re.search(r"0x([0-9a-f]+)", rest) if op.startswith("BRA") else None
        if target and int(target[1], 16) < at < end:
            body = [name for here, name, _ in lines if int(target[1], 16) <= here <= at]
            if any(name.startswith(MATRIX) for name in body):
                loops.append(body)
    return min(loops, key=len, default=[])


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
    lanes = p["BLOCK_K"] if "BLOCK_K" in p else p["PART"] * p["PARTS"]
    return p["ROWS"] * min(lanes, int(re.findall(r"K=(\d+)", variant.name)[0]))


def tensor_core(ptx: str) -> str:
    """The matrix instructions in the PTX, shortest form."""
    found = set(re.findall(r"(wgmma\.mma_async\S*|tcgen05\.mma\S*|mma\.sync\S*)", ptx))
    return " ".join(sorted(re.sub(r"\.sync\.aligned|\.row\.col|\.cta_group::1", "", f).rstrip(";")
                           for f in found))  # fmt: skip


def _run(*command: Any) -> str:
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
        if arch != 80 or "*fp8e4nv" not in _variants()[i].types.values()
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
