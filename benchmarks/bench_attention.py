"""Time of quantized attention against scaled_dot_product_attention, every backend it offers.

    python -m benchmarks.bench_attention       needs a GPU; without one, what the compiler makes of
                                               the kernels is reported instead, which is no timing

writes benchmarks/results/attention_<device>.csv: median of interleaved runs, buffers rotated so
that L2 does not answer, and the error against float64 softmax attention beside each time.
"""

import csv
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

HEADS, HEAD = 12, 64
LENGTHS = (128, 197, 512, 1024, 2048, 4096)
TOKENS = 32768  # of a call, all sequences together
RUNS, BUFFERS = 100, 4
BACKENDS = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")


def codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 with one scale a token and head."""
    scale = x.float().abs().amax(-1).clamp(min=1e-8) / 127
    return (x / scale[..., None]).round().to(torch.int8), scale


def quantized(qkv: list[Tensor], causal: bool, fp8: bool) -> Callable[[], Tensor]:
    """Code softmax of four steps, int8 first product, and v in float8 or int8 stored transposed."""
    from qtk_kernels.quantized_attention import quantized_attention

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


def time_of(calls: list[Callable[[], Any]]) -> float:
    """Median milliseconds of a call, through rotating buffers."""
    times = []
    for i in range(RUNS + 10):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        calls[i % len(calls)]()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return median(times[10:])


def error_of(y: Tensor, qkv: list[Tensor], causal: bool) -> float:
    """Relative, against float64."""
    q, k, v = (x[:1].double() for x in qkv)
    want = scaled_dot_product_attention(q, k, v, is_causal=causal)
    want = want.transpose(1, 2).flatten(2)
    got = (y.transpose(1, 2).flatten(2) if y.dim() == 4 else y)[:1].double()
    return float((got - want).norm() / want.norm())


def rows() -> list[dict[str, Any]]:
    out = []
    for T, causal in product(LENGTHS, (False, True)):
        shape = (max(TOKENS // T, 1), HEADS, T, HEAD)
        buffers = [
            [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
            for _ in range(BUFFERS)
        ]
        peers: dict[str, list[Callable[[], Tensor]]] = {
            name: [library(qkv, causal, name) for qkv in buffers] for name in BACKENDS
        }
        for fp8 in (False, True):
            peers[f"qtk code {'fp8' if fp8 else 'int8'}"] = [
                quantized(qkv, causal, fp8) for qkv in buffers
            ]
        for name, calls in peers.items():
            try:
                error = error_of(calls[0](), buffers[0], causal)
            except RuntimeError as refusal:  # a backend that does not take this shape
                print(f"{name}: {str(refusal).splitlines()[0]}", file=sys.stderr)
                continue
            out.append({"T": T, "causal": causal, "what": name, "ms": time_of(calls),
                        "error": error})  # fmt: skip
            print(out[-1], flush=True)
    return out


def main() -> None:
    if not torch.cuda.is_available():
        print("no GPU: no times. What the compiler makes of the kernels:", flush=True)
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        subprocess.run([sys.executable, "-m", "benchmarks.aot_attention"], env=env, check=True)
        return
    from benchmarks.fidelity import RESULTS

    device = torch.cuda.get_device_name().replace(" ", "_")
    with (RESULTS / f"attention_{device}.csv").open("w", newline="") as file:
        found = rows()
        writer = csv.DictWriter(file, ["device", "torch", *found[0]])
        writer.writeheader()
        writer.writerows({"device": device, "torch": torch.__version__, **row} for row in found)


if __name__ == "__main__":
    main()
