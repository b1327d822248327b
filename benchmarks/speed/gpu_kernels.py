"""Every kernel at the shapes of BERT, ViT and OPT: time, rate, and share of what the GPU can do.

    python -m benchmarks.speed.gpu_kernels [--minutes 8] [--first] [--few N] [--fresh] [--packages]

Times are medians on the device, of CUDA graphs whose calls go around in more memory than a cache
holds. The ceilings, copy bandwidth and the rates of library matrix products, are measured in the
same run, and so are the peers: eager PyTorch, torch.compile, torch._int_mm, torch._scaled_mm,
bfloat16 products, and with --packages, at shapes of their own, gemlite and torchao where they are
installed. Rows are written as they come, one that fails with its error; another run goes on where
this one ran out of time or lost the device. Writes benchmarks/results/gpu_kernels_<device>.{csv,
json} and gpu_slower_<device>.json, the shapes where a peer is faster.

Without a GPU it measures nothing: it says so and runs the ahead-of-time report.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.result import COMMIT, RESULTS
from benchmarks.speed.gpu_device import PACKAGES, RESTART, file_of, has_gpu, head, this_run
from benchmarks.speed.gpu_peers import library, package
from benchmarks.speed.gpu_tables import Row, read_csv, settled, write_csv, write_tables
from qtk_kernels.codes import Codes
from qtk_kernels.hadamard_quantize import hadamard_quantize
from qtk_kernels.int8_linear import int8_linear
from qtk_kernels.layer_norm_quantize import layer_norm_quantize
from qtk_kernels.shift_scale_quantize import shift_scale_quantize
from qtk_kernels.tune import (
    KERNELS,
    MODELS,
    ROWS,
    Calls,
    answers,
    copies,
    linear_calls,
    microseconds,
    pairs_of,
    random_codes,
    rounds_of,
    said,
    widths,
)

DEVICE = "cuda"
QUANTIZERS = ("shift_scale_quantize", "gelu_quantize", "layer_norm_quantize", "hadamard_quantize")
FROM_FLOAT = "int8_linear from bfloat16"  # the quantizer and the product
# what design documents and other projects quote: square products of 4096 and 8192
SQUARES = [(M, n, n) for n in (4096, 8192) for M in (1, 16, 64, 256, 1024, n)]
BESIDE = " beside packages"  # which may tune themselves for minutes at a shape
Case = tuple[str, tuple[int, ...]]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--first", action="store_true", help="only what is quoted most")
    parser.add_argument("--few", type=int, help="this many cases, spread over all")
    parser.add_argument("--fresh", action="store_true", help="forget the rows of earlier runs")
    parser.add_argument("--packages", action="store_true", help="beside gemlite and torchao")
    options = parser.parse_args(arguments)
    if not has_gpu():
        print("No GPU: nothing is measured. The ahead-of-time report instead:", flush=True)
        return ahead_of_time()
    if options.packages and not any(find_spec(name) for name in PACKAGES):
        print(f"none of {', '.join(PACKAGES)} is installed: nothing to measure beside")
        return 0
    every = package_cases() if options.packages else first_cases() if options.first else cases()
    if options.few:
        every = every[:: max(len(every) // options.few, 1)][: options.few]
    return measure(every, 60 * options.minutes, options.fresh)


def measure(every: list[Case], seconds: float, fresh: bool) -> int:
    """Rows of all cases that have none, one written after the other, while there is time."""
    end, run = time.monotonic() + seconds, this_run()
    path = RESULTS / f"{file_of('gpu_kernels', run)}.csv"
    rows = [] if fresh else settled(read_csv(path, run))
    known = {(row["kernel"], row["shape"]) for row in rows}
    todo = [case for case in every if (case[0], shape_of(case)) not in known]
    limits, status = ceilings(), 0
    for case in filter(lambda case: has_instructions(case[0]), todo):
        if time.monotonic() > end:
            print("out of time: another run goes on from here", flush=True)
            break
        rows.append({"kernel": case[0], "shape": shape_of(case), **run, "commit": COMMIT})
        write_csv([*rows[:-1], {**rows[-1], "error": "ended the process", "fatal": "yes"}], path)
        try:
            rows[-1] |= measured(*case, limits)
        except Exception as error:  # the others are still to be measured
            rows[-1] |= {"error": said(error)}
        if not answers(torch.device(DEVICE)):
            rows[-1] = {
                **rows[-1],
                "error": rows[-1].get("error", "lost the device"),
                "fatal": "yes",
            }
            status = RESTART
        print(json.dumps(rows[-1]), flush=True)
        write_csv(rows, path)
        if status:
            break
        torch.cuda.empty_cache()
    write_tables(rows, run, head(run, limits), RESULTS)
    return status


def shape_of(case: Case) -> str:
    return "x".join(map(str, case[1]))


def ahead_of_time() -> int:
    report = [sys.executable, "-m", "benchmarks.compiler.report"]
    return subprocess.run(report, check=False).returncode


def ceilings() -> dict[str, float]:
    """Bytes and operations a microsecond of the library's copy and large matrix products."""
    a = torch.randint(0, 255, (1 << 30,), dtype=torch.uint8, device=DEVICE)
    b = torch.empty_like(a)
    found = {"bytes": 2 * a.numel() / microseconds([lambda: b.copy_(a)])}
    M = 8192
    for name in ("bf16", "int8", "fp8"):
        try:
            calls = library(name, M, M, M, DEVICE)
            if calls is not None:
                found[name] = 2 * M**3 / microseconds(calls)
        except Exception as error:
            print(f"no ceiling of {name}: {said(error)}", flush=True)
    return found


def cases() -> list[Case]:
    """Kernels and shapes, those that are quoted most first."""
    products, inner = (*KERNELS, FROM_FLOAT), {width for pair in MODELS.values() for width in pair}
    found: list[Case] = [("layer_norm_quantize", (8192, 4096))]
    found += [(kernel, shape) for shape, kernel in product(SQUARES, products)]
    found += [(kernel, (M, N, K)) for (N, K), M, kernel in product(widths(), ROWS, products)]
    found += [(kernel, (M, K)) for K, M, kernel in product(sorted(inner), ROWS, QUANTIZERS)]
    return list(dict.fromkeys(found))


def first_cases() -> list[Case]:
    """What fits into the minutes of one call: squares, and the models that are quoted most."""
    quoted = {pair for name in ("BERT-base", "OPT-1.3b") for pair in pairs_of(*MODELS[name])}
    products, inner = (*KERNELS, FROM_FLOAT), {K for _, K in quoted}
    found: list[Case] = [(kernel, (4096, K)) for K, kernel in product(sorted(inner), QUANTIZERS)]
    found += [(kernel, (M, 8192, 8192)) for M, kernel in product((16, 8192), products)]
    for M in (16, 512, 1, 4096, 64):
        found += [(kernel, (M, *pair)) for pair, kernel in product(sorted(quoted), products)]
    return found


def package_cases() -> list[Case]:
    kernels = ("weight_only_linear W4A16 grouped", FROM_FLOAT)
    shapes = product((1, 16, 64, 1024), (4096, 8192))
    return [(kernel + BESIDE, (M, n, n)) for (M, n), kernel in product(shapes, kernels)]


def has_instructions(name: str) -> bool:
    """Tensor cores multiply float8 from sm_89 on."""
    return name != "fp8_linear" or DEVICE != "cuda" or torch.cuda.get_device_capability() >= (8, 9)


def measured(name: str, shape: tuple[int, ...], limits: dict[str, float]) -> Row:
    """Times in microseconds, and what the roofs are for this kernel."""
    calls = calls_of(name, shape)
    start = time.perf_counter()
    calls[0]()
    synchronize()
    first = time.perf_counter() - start
    kind = "int8" if name.startswith("int") else "fp8" if name.startswith("fp8") else "bf16"
    row: Row = {
        "kernel": name, "shape": shape_of((name, shape)), "us": round(microseconds(calls), 3),
        **work_of(name, shape), "roof_bytes": limits["bytes"],
        "roof_ops": limits.get(kind, limits["bf16"]), "first_call_s": round(first, 2),
    }  # fmt: skip
    for peer, make in peers_of(name, shape).items():
        try:
            theirs = make()
            if theirs is not None:
                row[f"{peer}_us"] = round(microseconds(theirs), 3)
        except Exception as error:  # a peer that fails is no reason to lose our own time
            print(f"{peer} at {name} {row['shape']}: {said(error)}", flush=True)
            if not answers(torch.device(DEVICE)):  # a restart keeps our own time
                row["error"] = f"{peer}: {said(error)}"
                break
    return row


def calls_of(name: str, shape: tuple[int, ...]) -> Calls:
    """A round of calls of a kernel."""
    name = name.removesuffix(BESIDE)
    if name in QUANTIZERS:
        M, K = shape
        return quantizer_calls(name, M, K, "triton")
    M, N, K = shape
    if name == FROM_FLOAT:
        return from_float_calls(M, N, K)
    return linear_calls(name, M, N, K, torch.device(DEVICE))


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def work_of(name: str, shape: tuple[int, ...]) -> dict[str, float]:
    """Bytes that have to move and operations that have to be done."""
    if name in QUANTIZERS:
        M, K = shape
        return {"bytes": 3.0 * M * K + 4.0 * M + 8.0 * K, "ops": 0.0}
    M, N, K = shape
    weight = 0.5 if "W4" in name else 1.0
    tokens = 0.5 if "W4A4" in name else 2.0 if "A16" in name or FROM_FLOAT in name else 1.0
    return {"bytes": N * K * weight + M * K * tokens + 2.0 * M * N, "ops": 2.0 * M * N * K}


def from_float_calls(M: int, N: int, K: int) -> Calls:
    """Quantized per token, then the product."""
    x = torch.randn(M, K, device=DEVICE, dtype=torch.bfloat16)
    w, w_scale = random_codes(N, K, 127, DEVICE), torch.rand(N, 1, device=DEVICE)
    out: dict[str, Any] = {"out_dtype": torch.bfloat16, "backend": "triton"}
    n = rounds_of(x.nbytes + w.nbytes)

    def call(x: Tensor, w: Tensor) -> Callable[[], Any]:
        def run() -> Tensor:
            q, scale = shift_scale_quantize(x, None, None, Codes(8, "token"), backend="triton")
            return int8_linear(q, w, w_scale, x_scale=scale, **out)

        return run

    return [call(*pair) for pair in zip(copies(x, n), copies(w, n), strict=True)]


def quantizer(name: str, x: Tensor, a: Tensor, b: Tensor, how: str) -> Any:
    """A row kernel with scales per token."""
    codes = Codes(8, "token")
    if name == "gelu_quantize":
        return shift_scale_quantize(x, a, b, codes, activation="gelu", backend=how)
    if name == "layer_norm_quantize":
        return layer_norm_quantize(x, a, b, 1e-5, codes, backend=how)
    run = shift_scale_quantize if name == "shift_scale_quantize" else hadamard_quantize
    return run(x, a, b, codes, backend=how)


def quantizer_calls(name: str, M: int, K: int, how: str) -> Calls:
    """The kernel, or its definition in eager ("reference") or compiled ("compiled") PyTorch."""
    x = torch.randn(M, K, device=DEVICE, dtype=torch.bfloat16)
    a, b = torch.rand(K, device=DEVICE), torch.randn(K, device=DEVICE)
    run, how = (compiled(name), "reference") if how == "compiled" else (quantizer, how)
    return [partial(run, name, x, a, b, how) for x in copies(x, rounds_of(x.nbytes))]


@cache
def compiled(name: str) -> Callable[..., Any]:
    """One compilation serves all shapes."""
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(quantizer, dynamic=True)


def peers_of(name: str, shape: tuple[int, ...]) -> dict[str, Callable[[], Calls | None]]:
    """How to make every peer of a kernel."""
    if name in QUANTIZERS:
        M, K = shape
        return {"eager": lambda: quantizer_calls(name, M, K, "reference"),
                "compile": lambda: quantizer_calls(name, M, K, "compiled")}  # fmt: skip
    M, N, K = shape
    found: dict[str, Callable[[], Calls | None]] = {
        "bf16": lambda: library("bf16", M, N, K, DEVICE)
    }
    if name == "int8_linear":
        found["int_mm"] = lambda: library("int8", M, N, K, DEVICE)
        found["int_mm_scaled"] = lambda: library("int8 scaled", M, N, K, DEVICE)
    if name == "fp8_linear":
        found["scaled_mm"] = lambda: library("fp8", M, N, K, DEVICE)
    if name.endswith(BESIDE):
        layer = "W8A8" if FROM_FLOAT in name else "W4A16"
        for other in PACKAGES:
            found[other] = partial(package, other, layer, M, N, K, DEVICE)
    return found


if __name__ == "__main__":
    sys.exit(main())
