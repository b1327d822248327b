"""Time of quantized attention against scaled_dot_product_attention, every backend it offers.

    python -m benchmarks.speed.gpu_attention [--minutes 8]
                                               needs a GPU; without one, what the compiler makes of
                                               the kernels is reported instead, which is no timing

writes benchmarks/results/gpu_attention.json: medians on the device of CUDA graphs that go around in
more memory than a cache holds, and the error against float64 softmax attention beside each time.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.result import RESULTS, Row, result, write
from benchmarks.speed.gpu_device import head, this_run
from qtk_kernels.quantized_attention import quantized_attention
from qtk_kernels.tune import microseconds

DEVICE = "cuda"
HEADS, HEAD = 12, 64
LENGTHS = (128, 197, 512, 1024, 2048, 4096)
TOKENS = 32768  # of a call, all sequences together
BUFFERS = 4
BACKENDS = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")


def codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 with scales per token and head."""
    scale = x.float().abs().amax(-1).clamp(min=1e-8) / 127
    return (x / scale[..., None]).round().to(torch.int8), scale


def quantized(qkv: list[Tensor], causal: bool, fp8: bool) -> Callable[[], Tensor]:
    """Code softmax of four steps, int8 first product, and v in float8 or int8 stored transposed."""
    (q, q_scale), (k, k_scale) = codes(qkv[0]), codes(qkv[1])
    v, v_scale = qkv[2].to(torch.float8_e4m3fn), None
    if not fp8:
        v_scale = qkv[2].float().abs().amax(2) / 127
        v = (qkv[2] / v_scale[:, :, None]).round().to(torch.int8)
    v = v.transpose(2, 3).contiguous().transpose(2, 3)
    return lambda: quantized_attention(
        q, k, v, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, softmax="code", steps=4,
        causal=causal, out_dtype=torch.bfloat16,
    )  # fmt: skip


def library(qkv: list[Tensor], causal: bool, backend: str) -> Callable[[], Tensor]:
    q, k, v = qkv

    def run() -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return scaled_dot_product_attention(q, k, v, is_causal=causal)

    return run


def error_of(y: Tensor, qkv: list[Tensor], causal: bool) -> float:
    """Relative, against float64."""
    q, k, v = (x[:1].double() for x in qkv)
    want = scaled_dot_product_attention(q, k, v, is_causal=causal)
    want = want.transpose(1, 2).flatten(2)
    got = (y.transpose(1, 2).flatten(2) if y.dim() == 4 else y)[:1].double()
    return float((got - want).norm() / want.norm())


def measured(T: int, causal: bool) -> list[Row]:
    """A line for each contender: microseconds, speed over the best library backend, error."""
    shape = (max(TOKENS // T, 1), HEADS, T, HEAD)
    buffers = [
        [torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(3)]
        for _ in range(BUFFERS)
    ]
    contenders: dict[str, list[Callable[[], Tensor]]] = {
        name: [library(qkv, causal, name) for qkv in buffers] for name in BACKENDS
    }
    for fp8 in (False, True):
        name = f"qtk code {'fp8' if fp8 else 'int8'}"
        contenders[name] = [quantized(qkv, causal, fp8) for qkv in buffers]
    found = {}
    for name, calls in contenders.items():
        try:
            found[name] = error_of(calls[0](), buffers[0], causal), microseconds(calls)
        except Exception as refusal:  # does not take this shape or this device
            print(f"{name}: {(str(refusal) or 'refused').splitlines()[0]}", file=sys.stderr)
    best = min((us for name, (_, us) in found.items() if name in BACKENDS), default=float("nan"))
    return [
        [str(T), "yes" if causal else "no", name, f"{us:.1f}", f"{best / us:.2f}x", f"{error:.4f}"]
        for name, (error, us) in found.items()
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no GPU: no times. What the compiler makes of the kernels:", flush=True)
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        subprocess.run([sys.executable, "-m", "benchmarks.compiler.attention"], env=env, check=True)
        return
    end, rows = time.monotonic() + 60 * options.minutes, []
    for T, causal in product(LENGTHS, (False, True)):
        if time.monotonic() > end:
            print("out of time: longer sequences were not measured", flush=True)
            break
        rows += measured(T, causal)
        print(*rows[-1], flush=True)
    table = result(
        "Attention on a GPU",
        ["tokens", "causal", "what", "us", "over the best library", "relative error"],
        rows,
        f"{HEADS} heads of {HEAD}, {TOKENS} tokens per call; quantizing q, k and v is not "
        "in the time; errors on random numbers",
        **head(this_run()),
    )
    write("gpu_attention", table, RESULTS)


if __name__ == "__main__":
    main()
