"""Every kernel at the shapes of BERT, ViT and OPT: time, rate, and share of what the GPU can do.

    python -m benchmarks.bench_kernels [--minutes 9]

Times are medians of device events, with weights and activations that go around more memory than a
cache holds. The ceilings, copy bandwidth and the rates of library matrix products, are measured in
the same run, and so are the peers: eager PyTorch, torch.compile, torch._int_mm, torch._scaled_mm,
bfloat16 products, and gemlite and torchao where they are installed. Writes
benchmarks/results/gpu_kernels.{json,csv,png}.

Without a GPU it measures nothing: it says so and runs the ahead-of-time report.
"""

import argparse
import csv
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from qtk_kernels._tune import KERNELS, MODELS, ROWS, linear_call, microseconds, widths
from qtk_kernels.fp8_linear import to_fp8
from qtk_kernels.gelu_quantize import activation_quantize
from qtk_kernels.hadamard_quantize import hadamard_quantize
from qtk_kernels.layer_norm_quantize import layer_norm_quantize
from qtk_kernels.shift_scale_quantize import shift_scale_quantize

RESULTS = Path(__file__).parent / "results"
QUANTIZER_ROWS = (512, 4096, 16384)
Call = Callable[[int], Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=9.0)
    minutes = parser.parse_args().minutes
    if not torch.cuda.is_available():
        print("No GPU: nothing is measured. The ahead-of-time report instead:", flush=True)
        report = Path(__file__).parent / "aot_report.py"
        return subprocess.run([sys.executable, str(report)], check=False).returncode
    end = time.monotonic() + 60 * minutes
    limits = ceilings()
    rows = []
    for name, shape, work, call, peers in cases():
        if time.monotonic() > end:
            print("out of time: the rest of the shapes was not measured", flush=True)
            break
        rows.append(measured(name, shape, work, call, peers, limits))
        print(json.dumps(rows[-1]), flush=True)
        torch.cuda.empty_cache()
    write(rows, limits)
    return 0


def ceilings() -> dict[str, float]:
    """Bytes and operations a microsecond of the library's copy and large matrix products."""
    a = torch.randint(0, 255, (1 << 30,), dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    found = {"bytes": 2 * a.numel() / microseconds(lambda _: b.copy_(a))}
    M = 8192
    for name in ("bf16", "int8", "fp8"):
        call = library(name, M, M, M)
        if call is not None:
            found[name] = 2 * M**3 / microseconds(call)
    return found


def library(name: str, M: int, N: int, K: int) -> Call | None:
    """A library's matrix product, or None where it does not take the shape or the device."""
    x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16)
    copies = min(max((1 << 28) // (2 * N * K), 1), 32) + 1
    w = [torch.randn(N, K, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    if name == "bf16":
        return lambda i: F.linear(x, w[i % copies])
    if name == "int8":
        if M <= 16 or N % 8 or K % 8:
            return None
        q, ws = x.to(torch.int8), [v.to(torch.int8) for v in w]
        return lambda i: torch._int_mm(q, ws[i % copies].T)
    if torch.cuda.get_device_capability() < (8, 9) or N % 16 or K % 16:
        return None
    one = torch.ones((), device="cuda")
    q, ws = to_fp8(x)[0], [to_fp8(v)[0] for v in w]
    return lambda i: torch._scaled_mm(
        q, ws[i % copies].T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16
    )


Case = tuple[str, tuple[int, ...], dict[str, float], Call, dict[str, Call]]


def cases() -> Iterator[Case]:
    """name, shape, bytes and operations, the kernel, its peers."""
    for M, K in product(QUANTIZER_ROWS, sorted({w for pair in MODELS.values() for w in pair})):
        yield from quantizers(M, K)
    for M, (N, K), kernel in product(ROWS, widths(), KERNELS):
        weight = 0.5 if "W4" in kernel else 1.0
        tokens = 2.0 if "A16" in kernel else 0.5 if "A4" in kernel else 1.0
        work = {"bytes": N * K * weight + M * K * tokens + 2 * M * N, "ops": 2.0 * M * N * K}
        device = torch.device("cuda")
        yield (
            kernel,
            (M, N, K),
            work,
            linear_call(kernel, M, N, K, device),
            peers_of(kernel, M, N, K),
        )


def quantizers(M: int, K: int) -> Iterator[Case]:
    """The row kernels with a scale a token, against PyTorch eager and compiled."""
    copies = max((1 << 28) // (2 * M * K), 1) + 1
    xs = [torch.randn(M, K, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    a, b = torch.rand(K, device="cuda"), torch.randn(K, device="cuda")
    work = {"bytes": 3.0 * M * K, "ops": 0.0}
    options: dict[str, Any] = {"bits": 8, "granularity": "token"}
    ops: dict[str, Callable[..., Any]] = {
        "shift_scale_quantize": lambda x, how: shift_scale_quantize(
            x, a, b, **options, backend=how
        ),
        "gelu_quantize": lambda x, how: activation_quantize(
            x, a, b, activation="gelu", **options, backend=how
        ),
        "layer_norm_quantize": lambda x, how: layer_norm_quantize(
            x, a, b, 1e-5, **options, backend=how
        ),
        "hadamard_quantize": lambda x, how: hadamard_quantize(x, a, b, **options, backend=how),
    }
    for name, op in ops.items():

        def run(how: str, op: Callable[..., Any] = op) -> Call:
            return lambda i: op(xs[i % copies], how=how)

        compiled = torch.compile(op)
        peers = {"eager": run("reference"), "compiled": run("reference", compiled)}
        yield name, (M, K), work, run("triton"), peers


def peers_of(kernel: str, M: int, N: int, K: int) -> dict[str, Call]:
    names = ["bf16"] + ["int8"] * (kernel == "int8_linear") + ["fp8"] * (kernel == "fp8_linear")
    found = {name: library(name, M, N, K) for name in names}
    peers = {name: call for name, call in found.items() if call is not None}
    if kernel == "weight_only_linear W4A16 grouped":
        peers |= {name: call for name in ("gemlite", "torchao") if (call := packed(name, M, N, K))}
    return peers


def packed(name: str, M: int, N: int, K: int) -> Call | None:
    """W4A16 in groups of 128 of another project, None where it is not installed."""
    if find_spec(name) is None:
        return None
    x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16)
    linear = torch.nn.Linear(K, N, bias=False, device="cuda", dtype=torch.bfloat16)
    if name == "torchao":
        from torchao.quantization import Int4WeightOnlyConfig, quantize_

        quantize_(linear, Int4WeightOnlyConfig(group_size=128))
    else:
        from gemlite.helper import A16W4

        linear = A16W4(device="cuda", dtype=torch.bfloat16).from_linear(linear)
    return lambda _: linear(x)


def measured(
    name: str, shape: tuple[int, ...], work: dict[str, float], call: Call, peers: dict[str, Call],
    limits: dict[str, float],
) -> dict[str, Any]:  # fmt: skip
    """One row: times in microseconds, rates, and the share of the nearer ceiling."""
    start = time.perf_counter()
    call(0)
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    us = microseconds(call)
    kind = "int8" if name.startswith("int") else "fp8" if name.startswith("fp8") else "bf16"
    ops = work["ops"] / limits.get(kind, limits["bf16"])
    floor = max(work["bytes"] / limits["bytes"], ops)
    return {
        "kernel": name, "shape": "x".join(map(str, shape)), "us": round(us, 2),
        "GB/s": round(work["bytes"] / us / 1e3, 1), "TOPS": round(work["ops"] / us / 1e6, 2),
        "of_ceiling": round(floor / us, 3), "bound": "compute" if floor == ops else "memory",
        "first_call_s": round(first, 2),
        **{f"{peer}_us": round(microseconds(run), 2) for peer, run in peers.items()},
    }  # fmt: skip


def write(rows: list[dict[str, Any]], limits: dict[str, float]) -> None:
    """JSON, CSV and a roofline plot."""
    import triton

    head = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        "triton": triton.__version__, "cuda": torch.version.cuda,
        "ceilings": {k: round(v / 1e6, 3) for k, v in limits.items()},  # TB/s, TOPS
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({**head, "rows": rows}, indent=1)
    (RESULTS / "gpu_kernels.json").write_text(text + "\n", encoding="utf-8")
    names = list(dict.fromkeys(key for row in rows for key in row))
    with (RESULTS / "gpu_kernels.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    if find_spec("matplotlib") is not None:
        plot(rows, limits)


def plot(rows: list[dict[str, Any]], limits: dict[str, float]) -> None:
    """Operations a byte against the rate, below the measured roof."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 5))
    for name in dict.fromkeys(row["kernel"] for row in rows if row["TOPS"]):
        mine = [row for row in rows if row["kernel"] == name]
        intensity = [1e3 * row["TOPS"] / row["GB/s"] for row in mine]
        axes.loglog(intensity, [row["TOPS"] for row in mine], "o", label=name, markersize=3)
    x = [2.0**i for i in range(-1, 13)]
    for kind in ("bf16", "int8", "fp8"):
        if kind in limits:
            roof = [min(i * limits["bytes"], limits[kind]) / 1e6 for i in x]
            axes.loglog(x, roof, label=f"{kind} roof, measured", linewidth=1)
    axes.set_xlabel("operations a byte")
    axes.set_ylabel("TOPS")
    axes.legend(fontsize=7)
    figure.savefig(RESULTS / "gpu_kernels.png", dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    sys.exit(main())
