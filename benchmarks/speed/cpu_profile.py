"""Where the time of a model goes on a CPU, and how much of it arithmetic and memory would need.

    python -m benchmarks.speed.cpu_profile [MODEL ...]

PyTorch's profiler names the operations; what is left of the wall clock is the host: Python, and
waiting for threads. "floor" is integer (or float) operations over the rate of a large product
measured here, and the bytes of weights and activations over the measured copy bandwidth, whichever
is more, product by product. Writes benchmarks/results/cpu_profile.json.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.result import result, write
from benchmarks.speed.cpu_contenders import (
    CONTENDERS,
    MODELS,
    TOKENS,
    Forward,
    Size,
    build,
    inputs_of,
)
from qtk_kernels.int8_linear import int8_linear, prepare_int8

SIZES: dict[str, tuple[Size, ...]] = {
    **dict.fromkeys(("minilm", "bert", "opt"), ((1, 16), (1, 128), (16, 128), (32, 128))),
    "vit": ((1, TOKENS), (16, TOKENS)),
}
WHAT = ("float32", "bfloat16", "qtk W8A8")
KINDS = {  # an operation is of the first kind whose word it contains
    "products": ("qlinear", "addmm", "aten::mm", "mkldnn_linear", "linear_pointwise", "conv"),
    "attention": ("scaled_dot", "bmm", "softmax"),
    "activation": ("gelu", "relu", "tanh"),
    "norms": ("layer_norm",),
    "codes": ("round", "clamp"),
    "copies": ("copy_", "_to_copy", "cat", "index", "embedding"),
    "sums": ("add", "mul"),
}  # fmt: skip


def kind_of(operation: str) -> str:
    return next((k for k, words in KINDS.items() if any(w in operation for w in words)), "other")


def median(call: Callable[[], Any], times: int = 5) -> float:
    """Milliseconds."""
    found = []
    for _ in range(times + 2):
        start = time.perf_counter()
        call()
        found.append(1e3 * (time.perf_counter() - start))
    return statistics.median(found[2:])


def rates() -> dict[str, float]:
    """Operations a nanosecond (multiplication and addition are two) and bytes a nanosecond."""
    M, K, N = 2048, 768, 3072
    x, w = torch.randn(M, K), torch.randn(N, K)
    half, codes = (x.bfloat16(), w.bfloat16()), torch.randint(0, 255, (M, K), dtype=torch.uint8)
    operand, scale = prepare_int8(torch.ones(N, K, dtype=torch.int8), "cpu"), torch.ones(N, 1)
    source = torch.empty(64 << 20, dtype=torch.uint8)
    target = torch.empty_like(source)
    work = 2e-6 * M * N * K
    return {
        "float32": work / median(lambda: nn.functional.linear(x, w)),
        "bfloat16": work / median(lambda: nn.functional.linear(*half)),
        "qtk W8A8": work / median(lambda: int8_linear(codes, operand, scale, backend="cpu")),
        "bytes": 2e-6 * source.numel() / median(lambda: target.copy_(source)),
    }


def floor(model: nn.Module, size: Size, what: str, rate: dict[str, float]) -> float:
    """Milliseconds that the linears need at least."""
    read, written = {"float32": (4, 4), "bfloat16": (2, 2), "qtk W8A8": (1, 4)}[what]
    total = 0.0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            M = size[0] if "pooler" in name else size[0] * size[1]
            K, N = module.in_features, module.out_features
            moved = (N * K + M * K) * read + M * N * written
            total += max(2 * M * N * K / rate[what], moved / rate["bytes"])
    return 1e-6 * total


def shares(forward: Forward, inputs: dict[str, Tensor], calls: int) -> dict[str, float]:
    """Milliseconds per call of each kind, by the profiler."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(calls):
            forward(inputs)
    sums = dict.fromkeys([*KINDS, "other"], 0.0)
    for event in found.key_averages():
        sums[kind_of(event.key)] += 1e-3 * event.self_cpu_time_total / calls
    return sums


@torch.inference_mode()
def run(models: list[str]) -> dict[str, Any]:
    rate, rows = rates(), []
    for name in models:
        for what in WHAT:
            with torch.inference_mode(False):
                model = build(name)
                forward = CONTENDERS[what](model, name)
            for size in SIZES[name]:
                inputs = inputs_of(name, size)
                wall = median(lambda f=forward, i=inputs: f(i))  # type: ignore[misc]
                parts = shares(forward, inputs, 3 if size[0] > 1 else 20)
                host = max(wall - sum(parts.values()), 0.0)
                least = floor(model, size, what, rate)
                cells = [wall, least, *parts.values(), host]
                where = f"{MODELS[name][0].split(',')[0]} {size[0]}x{size[1]}"
                rows.append([where, what, *(f"{ms:.2f}" for ms in cells)])
    named = {k: f"{v:.1f} {'GB/s' if k == 'bytes' else 'GOP/s'}" for k, v in rate.items()}
    return result(
        "Where the time of a model goes on a CPU, milliseconds",
        ["model", "what", "wall", "floor of the linears", *KINDS, "other ops", "host"],
        rows,
        "PyTorch's profiler, which slows small calls down: the kinds of a 1x16 call "
        "may sum to more than they take; host is what they leave of the wall clock; measured: "
        + ", ".join(f"{k} {v}" for k, v in named.items()),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(MODELS), metavar="|".join(MODELS))
    write("cpu_profile", run(parser.parse_args().models))
