"""Compiles the attention kernels for GPUs that need not be there, and counts their instructions.

    python -m benchmarks.aot_attention         sm_80, sm_90 and sm_100: a table, and
                                               benchmarks/results/aot_attention.csv

"instructions per score" are those of the loop over keys (of the whole kernel where one tile holds a
row), as the compiler laid them out, over the scores that the program computes in it: what a
program issues a score element, all its threads together. Beside them stands a plain Triton flash
attention written in the same style. Nothing here is a timing.
"""

import csv
import os
import re
import sys
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path

if os.environ.get("TRITON_INTERPRET") == "1":
    raise RuntimeError("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / p) for p in ("kernels", "benchmarks")]

import aot_report
import torch
import triton
from flash_attention import flash_attention_kernel

from qtk_kernels import log_softmax_quantize, quantized_attention
from qtk_kernels._softmax import OFFSET

HEAD = 64
SCALES = {"q_scale_ptr": "*fp32", "k_scale_ptr": "*fp32", "v_scale_ptr": "*fp32"}
CONTIGUOUS = {f"stride_{x}b": "i32" for x in "qkv"}


@dataclass(frozen=True)
class Row(aot_report.Row):
    """What the compiler made of a variant, and what a score costs.

    Attributes:
        scores: that one program computes in one turn of its loop.
        per_score: instructions a score.
        mufu_in_loop: special-function instructions in the loop.
    """

    scores: int
    per_score: float
    mufu_in_loop: int


def variant(
    name: str, T: int, kind: str, qk: str, v: str, *, steps: int = 1, per_head: bool = True,
    masked: bool = False, codes_out: bool = False,
) -> aot_report.Variant:  # fmt: skip
    """One kernel variant at head size 64.

    Args:
        qk: "bf16", "i8" or "u8" (packed int4); v: "bf16", "i8" or "fp8", the last stored transposed.
        per_head: k_scale is one a head, folded into q_scale by the caller.
        masked: a padding mask, else T keys fill the tiles.
    """
    tile = quantized_attention.attention_tile(T, T, kind in ("code", "float"), v == "fp8")
    packed = qk == "u8"
    types = {"q_ptr": f"*{qk}", "k_ptr": f"*{qk}", "v_ptr": "*bf16" if v == "bf16" else "*i8"}
    if qk != "bf16":
        types |= {k: t for k, t in SCALES.items() if k != "k_scale_ptr" or not per_head}
    types["out_ptr"] = "*i8" if codes_out else "*bf16"
    if masked:
        types["mask_ptr"] = "*u8"
    if codes_out:
        types |= {"multiplier_ptr": "*fp32", "offset_ptr": "*fp32"}
    width = HEAD // 2 if packed else HEAD
    params = {
        "KIND": kind, "STEPS": steps, "TOP": 255, "OFFSET": OFFSET.get(steps, 0.0),
        "RENORMALIZE": False, "ONE_TILE": T <= tile["BLOCK_N"], "CAUSAL": False,
        "TAIL": masked or T % tile["BLOCK_N"] > 0, "PACKED": packed, "V_FP8": v == "fp8",
        "QMIN": -128 if codes_out else 0, "QMAX": 127 if codes_out else 0, "EXACT": False,
        "BLOCK_W": max(width, 32), "BLOCK_D": HEAD, "D": HEAD, "width": width,
        "stride_vt": 1 if v == "fp8" else 3 * HEAD * 12,
        "stride_vd": T if v == "fp8" else 1, **tile,
    }  # fmt: skip
    return aot_report.Variant(name, quantized_attention._quantized_attention_kernel, types, params)
