"""What the compiler makes of the kernels, for GPUs that need not be there.

In a process of its own, because kernels of the interpreter cannot be compiled.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
NAMES = [
    "layer_norm_quantize w8 token K=768",
    "gelu_quantize w4 g128 K=4096",
    "int8_linear M=1 g=0",
    "int8_linear M=8192 g=128",
    "int4_linear W4A8 M=8192 g=0",
    "int4_linear W4A4 M=256 g=128",
    "weight_only_linear W4A16 M=1 g=128",
    "weight_only_linear W4A16 M=8192 g=128",
]
TENSOR_CORE = {  # on sm_90: wgmma, but mma.sync where a left operand is unpacked in registers
    "int8_linear M=1 g=0": "wgmma.mma_async.m64n16k32.s32.s8.s8",
    "int8_linear M=8192 g=128": "wgmma.mma_async.m64n64k32.s32.s8.s8",
    "int4_linear W4A8 M=8192 g=0": "wgmma.mma_async.m64n128k32.s32.s8.s8",
    "int4_linear W4A4 M=256 g=128": "mma.m16n8k32.satfinite.s32.s8.s8.s32",
    "weight_only_linear W4A16 M=1 g=128": "mma.m16n8k16.f32.bf16.bf16.f32",
    "weight_only_linear W4A16 M=8192 g=128": "wgmma.mma_async.m64n64k16.f32.bf16.bf16",
}
PROGRAM = """
import json, sys
from dataclasses import asdict
import aot_report
names = json.loads(sys.argv[1])
variants = {v.name: v for v in [*aot_report.row_variants(), *aot_report.gemm_variants()]}
rows = [asdict(aot_report.report(variants[n], 90)) for n in names]
rows += [asdict(aot_report.report(variants[n], 80)) for n in names if "8192" in n]
print(json.dumps(rows))
"""


@pytest.fixture(scope="module")
def compiled():
    if find_spec("triton") is None:
        pytest.skip("needs triton")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(NAMES)],
        cwd=BENCHMARKS, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_nothing_spills(compiled):
    assert {r["variant"]: r["spill_bytes"] for r in compiled if r["spill_bytes"]} == {}


def test_shared_memory_fits_every_device(compiled):
    assert all(row["shared"] <= 99 * 1024 for row in compiled)


def test_tensor_cores_are_used(compiled):
    found = {r["variant"]: r["tensor_core"] for r in compiled if r["arch"] == 90}
    assert {name: found[name] for name in TENSOR_CORE} == TENSOR_CORE
    assert all(r["tensor_core"].startswith("mma.m16n8k") for r in compiled if r["arch"] == 80)


def test_weights_are_not_converted_one_by_one(compiled):
    """int4 to bfloat16 goes through a mantissa; what is left converts sizes and pointers."""
    for row in compiled:
        if row["variant"].startswith(("weight_only", "layer_norm", "gelu")):
            assert row["i2f"] <= 4 and row["f2i"] <= 4


def test_wgmma_is_not_serialized(compiled):
    assert [r["variant"] for r in compiled if r["serialized"]] == []
