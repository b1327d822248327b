"""Compiles the attention kernels for GPUs that need not be there, and counts their instructions.

    python -m benchmarks.compiler.attention    sm_80, sm_90 and sm_100: a table, and
                                               benchmarks/results/aot_attention.csv

"instructions per score" are those of the loops over keys (of the whole kernel where one tile holds
a row), as the compiler laid them out, over the scores that the program computes in one turn: what
it issues per score, all its threads together, both loops where scores are computed twice.
Beside them stands a plain Triton flash attention written in the same style. Nothing here is a
timing.
"""

import csv
import os
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path

if os.environ.get("TRITON_INTERPRET") == "1":
    raise RuntimeError("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")

import torch
import triton

from benchmarks.compiler import report as compiler
from benchmarks.compiler.disassembly import instructions, outermost
from benchmarks.compiler.flash_attention import flash_attention_kernel
from benchmarks.compiler.variants import Variant
from benchmarks.result import COMMIT, RESULTS
from qtk_kernels import quantized_attention
from qtk_kernels._launch import next_power_of_2
from qtk_kernels._softmax import OFFSET

HEAD = 64
SCALES = {"q_scale_ptr": "*fp32", "k_scale_ptr": "*fp32", "v_scale_ptr": "*fp32"}


@dataclass(frozen=True)
class Row(compiler.Row):
    """What the compiler made of a variant, and what a score costs.

    Attributes:
        scores: that one program computes in one turn of its loop, or of both.
        per_score: instructions a score.
        mufu_in_loop: special-function instructions in the loops.
    """

    scores: int
    per_score: float
    mufu_in_loop: int


BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "i8": 1, "fp8": 1, "u8": 1}  # of a channel of q, k or v


def variant(
    name: str, T: int, kind: str, qk: str, v: str, *, steps: int = 1, per_head: bool = True,
    masked: bool = False, head: int = HEAD,
) -> Variant:  # fmt: skip
    """One kernel variant.

    Args:
        qk: "fp32", "bf16", "fp16", "i8" or "u8" (packed int4).
        v: those floats, "i8" or "fp8"; bytes are stored transposed.
        per_head: k_scale is one per head, folded into q_scale by the caller.
        masked: a padding mask, else T keys fill the tiles.
        head: channels of a head.
    """
    grid = kind == "code" and quantized_attention.WHOLE < T
    one_pass = grid or kind == "float"
    packed, floats = qk == "u8", qk not in ("i8", "u8")
    width = -(-head // 2) if packed else head
    BLOCK_W, BLOCK_D = max(next_power_of_2(width), 32), max(next_power_of_2(head), 16)
    tile = quantized_attention.attention_tile(
        T, T, BLOCK_D, one_pass, v == "fp8", BLOCK_W * BYTES[qk] + BLOCK_D * BYTES[v],
        packed=packed, rounds=kind != "float",
    )  # fmt: skip
    types = {"q_ptr": f"*{qk}", "k_ptr": f"*{qk}", "v_ptr": f"*{v}" if floats else "*i8"}
    if not floats:
        types |= {k: t for k, t in SCALES.items() if k != "k_scale_ptr" or not per_head}
    types["out_ptr"] = "*bf16"
    if masked:
        types["mask_ptr"] = "*u8"
    params = {
        "KIND": kind, "STEPS": steps, "TOP": 255, "OFFSET": OFFSET.get(steps, 0.0),
        "RENORMALIZE": False, "ONE_TILE": not grid and tile["BLOCK_N"] >= T, "GRID": grid,
        "CAUSAL": False,
        "TAIL": masked or T % tile["BLOCK_N"] > 0, "KEY_MASK": masked, "PACKED": packed,
        "V_FP8": v == "fp8", "EXACT": False,
        "BLOCK_W": BLOCK_W, "BLOCK_D": BLOCK_D, "D": head, "width": width, "Tq": T, "Tk": T,
        "stride_vt": 3 * head * 12 if floats else 1,
        "stride_vd": 1 if floats else T, **tile,
    }  # fmt: skip
    params |= {f"stride_{x}t": 3 * head * 12 for x in "qk"}  # numbers that a launch specializes on
    params |= {f"stride_{x}{axis}": 3 * head * 12 * 16 for x in "qkv" for axis in "bh"}
    return Variant(name, quantized_attention.quantized_attention_kernel, types, params)


def other_heads() -> list[Variant]:
    """Every dtype at the head sizes of others; 80 channels are held as 128."""
    kinds = (("float", "fp32", "fp32"), ("code", "fp32", "fp32"), ("float", "fp16", "fp16"),
             ("code", "bf16", "bf16"), ("code", "i8", "i8"), ("code", "i8", "fp8"),
             ("uniform", "i8", "i8"), ("code", "u8", "fp8"))  # fmt: skip
    return [
        variant(f"{kind}{'4' * (kind == 'code')} {'int4' if qk == 'u8' else qk} {v} T={T} D={head}",
                T, kind, qk, v, steps=4 if kind == "code" else 1, head=head)
        for head in (32, 64, 80, 128) for kind, qk, v in kinds for T in (197, 4096)
        if head != HEAD or qk == "fp32"
    ]  # fmt: skip


def variants() -> list[Variant]:
    """Long sequences (a loop over keys) and ViT's and BERT's (a row in one tile)."""
    out = [Variant(
        "flash bf16 T=4096 (plain)", flash_attention_kernel,
        dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), "*bf16"),
        {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_D": HEAD, "Tq": 4096, "Tk": 4096,
         "stride_t": 3 * HEAD * 12,
         "stride_b": 3 * HEAD * 12 * 16, "stride_h": HEAD, "num_warps": 8, "num_stages": 2},
    )]  # fmt: skip
    out += [
        variant("code1 i8 fp8 T=4096", 4096, "code", "i8", "fp8", steps=1),
        variant("code4 i8 fp8 T=4096", 4096, "code", "i8", "fp8", steps=4),
        variant("code4 i8 fp8 T=256", 256, "code", "i8", "fp8", steps=4),
        variant("code4 i8 i8 T=512", 512, "code", "i8", "i8", steps=4),
        variant("code4 bf16 bf16 T=4096", 4096, "code", "bf16", "bf16", steps=4),
        variant("float bf16 bf16 T=4096", 4096, "float", "bf16", "bf16"),
        variant("uniform i8 i8 T=256", 256, "uniform", "i8", "i8"),
        variant("code4 int4 fp8 T=4096", 4096, "code", "u8", "fp8", steps=4),
        variant("code4 i8 fp8 token scales T=4096", 4096, "code", "i8", "fp8", steps=4,
                per_head=False),
        variant("code4 i8 fp8 masked T=197", 197, "code", "i8", "fp8", steps=4, masked=True),
        variant("log2 i8 fp8 T=4096", 4096, "log2", "i8", "fp8"),
        variant("code4 i8 fp8 T=512", 512, "code", "i8", "fp8", steps=4),
        variant("uniform i8 i8 T=4096", 4096, "uniform", "i8", "i8"),
        variant("code4 i8 i8 T=128", 128, "code", "i8", "i8", steps=4),
    ]  # fmt: skip
    return out + other_heads()


def report(variant: Variant, arch: int) -> Row:
    """Compiles one variant and counts the instructions of its loops over keys."""
    row = compiler.report(variant, arch)
    params = variant.params
    compiled = compiler.compile_for(variant, arch)  # from Triton's cache
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "k.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        code = instructions(compiler.run(compiler.BIN / "cuobjdump", "-sass", cubin))
    ops = outermost(code) or code
    scores = params["BLOCK_M"] * params["BLOCK_N"]
    threads = 32 * params["num_warps"]
    return Row(
        **asdict(row), scores=scores, per_score=round(len(ops) * threads / scores, 2),
        mufu_in_loop=sum(op.startswith("MUFU") for _, op, _ in ops),
    )  # fmt: skip


def main() -> None:
    RESULTS.mkdir(exist_ok=True)
    torch_version = torch.__version__.split("+")[0]
    made = {"triton": triton.__version__, "torch": torch_version, "commit": COMMIT}
    with (RESULTS / "aot_attention.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*made, *(f.name for f in fields(Row))])
        writer.writeheader()
        for arch in sorted(compiler.ARCHS, key=lambda arch: arch != 90):  # 90 first: it is slow
            for item in variants():
                if arch == 80 and item.params.get("V_FP8"):
                    continue  # sm_80 has no float8_e4m3fn
                row = report(item, arch)
                writer.writerow({**made, **asdict(row)})
                file.flush()
                print(
                    f"{row.variant:34} sm_{row.arch:<4} {row.registers:4} regs "
                    f"{row.spill_bytes:5} spilled {row.mufu_in_loop:4} MUFU {row.per_score:6.2f} "
                    f"a score  {row.tensor_core}{'  SERIALIZED' if row.serialized else ''}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
