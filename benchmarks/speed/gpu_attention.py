"""Time of quantized attention against scaled_dot_product_attention, every backend it offers.

    python -m benchmarks.speed.gpu_attention [--minutes 8] [--few N]
                                               needs a GPU; without one, what the compiler makes of
                                               the kernels is reported instead, which is no timing

writes benchmarks/results/gpu_attention_<device>.json after each length: medians on the device of
CUDA graphs that go around in more memory than a cache holds, and the error against float64 softmax
attention beside each time. Another run goes on where this one ran out of time.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from math import nan
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.result import RESULTS, Row, read, result, write
from benchmarks.speed.gpu_device import RESTART, file_of, has_gpu, head, same_head, this_run
from qtk_kernels.codes import Codes
from qtk_kernels.quantized_attention import quantized_attention
from qtk_kernels.shift_scale_quantize import shift_scale_quantize
from qtk_kernels.tune import answers, microseconds, said

DEVICE = "cuda"
HEADS, HEAD = 12, 64
LENGTHS = (512, 128, 4096, 197, 1024, 2048)  # what is quoted most first
TOKENS = 32768  # of a call, all sequences together
BUFFERS = 4
BACKENDS = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")
Scaled = tuple[Tensor, Tensor]  # codes and their scales


def codes(x: Tensor) -> Scaled:
    """int8 with scales per token and head."""
    scale = x.float().abs().amax(-1).clamp(min=1e-8) / 127
    return (x / scale[..., None]).round().to(torch.int8), scale


def views(buffer: Tensor) -> list[Tensor]:
    """q, k and v, [B, H, T, D] each, of what one product wrote, [B, T, 3, H, D]."""
    return list(buffer.permute(2, 0, 3, 1, 4).unbind(0))


def attend(q: Scaled, k: Scaled, v: Tensor, v_scale: Tensor | None, causal: bool) -> Tensor:
    """Code softmax of four steps."""
    return quantized_attention(
        q[0], k[0], v, q_scale=q[1], k_scale=k[1], v_scale=v_scale, softmax="code", steps=4,
        causal=causal, out_dtype=torch.bfloat16, backend="triton",
    )  # fmt: skip


def quantized(buffer: Tensor, causal: bool, fp8: bool) -> Callable[[], Tensor]:
    """int8 first product, and v in float8 or int8 stored transposed; all of it given."""
    floats = views(buffer)
    q, k = codes(floats[0]), codes(floats[1])
    v, v_scale = floats[2].to(torch.float8_e4m3fn), None
    if not fp8:
        v_scale = floats[2].float().abs().amax(2) / 127
        v = (floats[2] / v_scale[:, :, None]).round().to(torch.int8)
    v = v.transpose(2, 3).contiguous().transpose(2, 3)
    return lambda: attend(q, k, v, v_scale, causal)


def quantizing(buffer: Tensor, causal: bool) -> Callable[[], Tensor]:
    """From bfloat16: q and k quantized by one kernel, v to float8 and transposed by another."""
    B, T, _, H, D = buffer.shape
    floats = views(buffer)[2]
    v = torch.empty(B, H, D, T, dtype=torch.float8_e4m3fn, device=buffer.device)
    grid = Codes(8, D)  # a scale for each head of a token

    def run() -> Tensor:
        rows = buffer.view(B * T, 3 * H * D)[:, : 2 * H * D]
        q, scale = shift_scale_quantize(rows, None, None, grid, backend="triton")
        assert scale is not None  # a grid of groups has scales
        (q_, k_), scales = q.view(B, T, 2, H, D).permute(2, 0, 3, 1, 4), scale.view(B, T, 2, H)
        q_scale, k_scale = scales.permute(2, 0, 3, 1)
        v.copy_(floats.transpose(2, 3))
        return attend((q_, q_scale), (k_, k_scale), v.transpose(2, 3), None, causal)

    return run


def library(buffer: Tensor, causal: bool, backend: str) -> Callable[[], Tensor]:
    q, k, v = views(buffer)

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


CONTENDERS: dict[str, Callable[[Tensor, bool], Callable[[], Tensor]]] = {
    **{name: partial(library, backend=name) for name in BACKENDS},
    "qtk code int8": partial(quantized, fp8=False),
    "qtk code fp8": partial(quantized, fp8=True),
    "qtk code fp8, q, k, v quantized too": quantizing,
}


def measured(T: int, causal: bool) -> list[Row]:
    """A line for each contender: microseconds, speed over the best library backend, error."""
    shape = (max(TOKENS // T, 1), T, 3, HEADS, HEAD)
    buffers = [torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(BUFFERS)]
    found: dict[str, tuple[float, float] | str] = {}
    for name, make in CONTENDERS.items():
        try:
            calls = [make(buffer, causal) for buffer in buffers]
            found[name] = error_of(calls[0](), views(buffers[0]), causal), microseconds(calls)
        except Exception as refusal:  # does not take this shape or this device
            found[name] = said(refusal)
            if not answers(torch.device(DEVICE)):
                break
    times = [x[1] for name, x in found.items() if name in BACKENDS and not isinstance(x, str)]
    return [row_of(T, causal, name, x, min(times, default=nan)) for name, x in found.items()]


def row_of(T: int, causal: bool, name: str, found: tuple[float, float] | str, best: float) -> Row:
    start = [str(T), "yes" if causal else "no", name]
    if isinstance(found, str):
        return [*start, "", "", found]
    error, us = found
    return [*start, f"{us:.1f}", f"{best / us:.2f}x", f"{error:.4f}"]


def table(rows: list[Row], run: dict[str, str]) -> dict[str, Any]:
    return result(
        "Attention on a GPU",
        ["tokens", "causal", "what", "us", "over the best library", "relative error"],
        rows,
        f"{HEADS} heads of {HEAD}, {TOKENS} tokens per call; all read q, k and v as views of one "
        "buffer, ours as codes that are given but where it says so; errors on random numbers",
        **head(run),
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--few", type=int, help="this many lengths")
    options = parser.parse_args(arguments)
    if not has_gpu():
        print("no GPU: no times. What the compiler makes of the kernels:", flush=True)
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        subprocess.run([sys.executable, "-m", "benchmarks.compiler.attention"], env=env, check=True)
        return 0
    end, run = time.monotonic() + 60 * options.minutes, this_run()
    name = file_of("gpu_attention", run)
    old = read(name, RESULTS)
    rows: list[Row] = old.get("rows", []) if same_head(old, head(run)) else []
    for causal, T in product((False, True), LENGTHS[: options.few]):
        case = [str(T), "yes" if causal else "no"]
        if case in [row[:2] for row in rows]:
            continue
        if time.monotonic() > end:
            print("out of time: another run goes on from here", flush=True)
            break
        write(name, table([*rows, [*case, "", "", "", "ended the process"]], run), RESULTS)
        found = measured(T, causal)
        rows += found
        print(*(" ".join(row) for row in found), sep="\n", flush=True)
        write(name, table(rows, run), RESULTS)
        if not answers(torch.device(DEVICE)):
            return RESTART
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
