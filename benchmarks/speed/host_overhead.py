"""What a call of a kernel costs on the host, without the launch itself.

    python -m benchmarks.speed.host_overhead

The launch is replaced by nothing, so that what remains is ours: checks, shapes, strides, tiles and
the allocation of the result. Needs no GPU; measured on the CPU that it names. "first" is a call of
a signature that no call had before, "in a graph" one through the operator that torch.compile puts
into its graphs. Writes benchmarks/results/host_overhead.json.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before the first import: lets CPU tensors through

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from benchmarks.result import result, versions_of, write
from qtk_kernels import (
    _split_k,
    fp8_linear,
    hadamard_quantize,
    int4_linear,
    int8_linear,
    layer_norm_quantize,
    quantized_attention,
    shift_scale_quantize,
    weight_only_linear,
)
from qtk_kernels._plan import forget
from qtk_kernels.codes import Codes
from qtk_kernels.packing import pack_int4


class Nothing:
    """Stands for a kernel; launches nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def calls() -> dict[str, Callable[[], Any]]:
    """One call of each op, 16 tokens, 768 channels; "split" is followed by a second launch."""
    M, N, K = 16, 768, 768
    x, v = torch.randn(M, K), torch.rand(K)
    x_q = torch.randint(-8, 8, (M, K), dtype=torch.int8)
    w_q = torch.randint(-8, 8, (N, K), dtype=torch.int8)
    w_4, w_scale, x_scale, bias = pack_int4(w_q), torch.rand(N, 1), torch.rand(M, 1), torch.rand(N)
    x_8, w_8 = fp8_linear.to_fp8(x)[0], fp8_linear.to_fp8(w_q)[0]
    wide = torch.randint(-8, 8, (2, 4096), dtype=torch.int8)
    heads = torch.randint(-8, 8, (1, 12, M, 64), dtype=torch.int8)
    head_scale, values = torch.rand(1, 12, M), torch.randn(1, 12, M, 64)
    mask = torch.ones(1, 1, 1, M, dtype=torch.bool)
    token = Codes(8, "token")
    triton: dict[str, Any] = {"backend": "triton"}
    scaled: dict[str, Any] = {"x_scale": x_scale, "backend": "triton"}
    return {
        "shift_scale_quantize": lambda: shift_scale_quantize.shift_scale_quantize(
            x, v, v, token, **triton
        ),
        "gelu, shift_scale_quantize": lambda: shift_scale_quantize.shift_scale_quantize(
            x, v, v, token, activation="gelu", **triton
        ),
        "layer_norm_quantize": lambda: layer_norm_quantize.layer_norm_quantize(
            x, v, v, 1e-5, token, residual=x, emit="sum", **triton
        ),
        "hadamard_quantize": lambda: hadamard_quantize.hadamard_quantize(x, v, v, token, **triton),
        "int8_linear": lambda: int8_linear.int8_linear(x_q, w_q, w_scale, bias, **scaled),
        "int8_linear, split": lambda: int8_linear.int8_linear(
            wide, wide, w_scale[:2], x_scale=x_scale[:2], backend="triton"
        ),
        "int4_linear": lambda: int4_linear.int4_linear(
            x_q, w_4, w_scale, bias, in_features=K, **scaled
        ),
        "weight_only_linear": lambda: weight_only_linear.weight_only_linear(
            x, w_4, w_scale, bias, bits=4, in_features=K, backend="triton"
        ),
        "fp8_linear": lambda: fp8_linear.fp8_linear(x_8, w_8, w_scale, bias, **scaled),
        "quantized_attention": lambda: quantized_attention.quantized_attention(
            heads,
            heads,
            values,
            q_scale=head_scale,
            k_scale=head_scale,
            softmax="code",
            steps=4,
            mask=mask,
            backend="triton",
        ),
    }


def stub() -> None:
    """Replaces every kernel that a launcher calls."""
    _split_k._add_parts_kernel = Nothing()
    shift_scale_quantize._shift_scale_quantize_kernel = Nothing()
    quantized_attention.quantized_attention_kernel = Nothing()  # type: ignore[assignment]
    for module in (layer_norm_quantize, hadamard_quantize, int8_linear, int4_linear,
                   weight_only_linear, fp8_linear):  # fmt: skip
        setattr(module, f"_{module.__name__.split('.')[-1]}_kernel", Nothing())


def microseconds(call: Callable[[], Any], repeats: int = 2000) -> float:
    """Median of single calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e6 * median(times)


def first(call: Callable[[], Any]) -> float:
    """Median of calls that meet no plan."""
    times = []
    for _ in range(20):
        forget()
        times.append(microseconds(call, 1))
    return median(times)


def in_a_graph(call: Callable[[], Any]) -> float:
    """The same call as `opaque` makes it while a graph is compiled."""
    eager, torch.compiler.is_compiling = torch.compiler.is_compiling, lambda: True
    try:
        return microseconds(call)
    finally:
        torch.compiler.is_compiling = eager


def main() -> None:
    torch.set_num_threads(1)
    ops = calls()
    stub()
    rows = [
        [name, *(f"{measure(call):.1f}" for measure in (microseconds, in_a_graph, first))]
        for name, call in ops.items()
    ]
    found = result(
        "Host time of a kernel call, without the launch",
        ["op", "microseconds", "in a graph", "first"],
        rows,
        "launch replaced by nothing; checks, tiles and the allocation of results remain; "
        "CPU tensors, so what a GPU's allocator costs is not in it",
        versions=versions_of("qtk", "torch", "triton"),
    )
    write("host_overhead", found)
    for row in rows:
        print(*row)


if __name__ == "__main__":
    main()
