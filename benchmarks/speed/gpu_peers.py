"""What the kernels are measured against: PyTorch's own products, gemlite and torchao.

A peer is a round of calls, each with weights and activations of its own, or None where it is not
installed or does not take the shape or the device. gemlite's and torchao's W8A8 quantize the
activations themselves: they stand beside our quantizer and product together.
"""

import importlib
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtk_kernels.fp8_linear import to_fp8
from qtk_kernels.tune import Calls, copies, random_codes, rounds_of

GROUP = 128


def library(name: str, M: int, N: int, K: int, device: str = "cuda") -> Calls | None:
    """torch's products: "bf16", "int8", "int8 scaled" and "fp8" (`_scaled_mm`, scales per row).

    "int8" is `_int_mm`, whose result is int32; "int8 scaled" is that with scales per token and
    channel, compiled, and a bfloat16 result: what a layer needs, and ours gives.
    """
    x = torch.randn(M, K, device=device, dtype=torch.bfloat16)
    w = torch.randn(N, K, device=device, dtype=torch.bfloat16)
    if name == "bf16":
        return rounds(lambda x, w: F.linear(x, w), x, w)
    if name.startswith("int8"):
        if M <= 16 or N % 8 or K % 8:
            return None
        codes = (random_codes(rows, K, 127, device) for rows in (M, N))
        if name == "int8":
            return rounds(lambda x, w: torch._int_mm(x, w.T), *codes)
        of_x, of_w = torch.rand(M, 1, device=device), torch.rand(N, 1, device=device)
        run = compiled_int8() if device == "cuda" else int8_product
        return rounds(lambda x, w: run(x, w, of_x, of_w), *codes)
    if (device == "cuda" and torch.cuda.get_device_capability() < (8, 9)) or N % 16 or K % 16:
        return None
    (x_q, x_scale), (w_q, w_scale) = to_fp8(x), to_fp8(w)

    def scaled(x: Tensor, w: Tensor) -> Tensor:
        return torch._scaled_mm(
            x, w.T, scale_a=x_scale, scale_b=w_scale.T, out_dtype=torch.bfloat16
        )

    return rounds(scaled, x_q, w_q)


def int8_product(x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor) -> Tensor:
    """[M, K] and [N, K] int8 to [M, N] bfloat16."""
    return (torch._int_mm(x, w.T) * x_scale * w_scale.T).to(torch.bfloat16)


@cache
def compiled_int8() -> Callable[..., Tensor]:
    """One compilation for all shapes, without a choice of products by timing."""
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(int8_product, dynamic=True)


def rounds(run: Callable[[Tensor, Tensor], Any], x: Tensor, w: Tensor) -> Calls:
    """Calls of `run` that go around in memory as our own do."""
    n = rounds_of(x.nbytes + w.nbytes)

    def call(x: Tensor, w: Tensor) -> Callable[[], Any]:
        return lambda: run(x, w)

    return [call(*pair) for pair in zip(copies(x, n), copies(w, n), strict=True)]


def package(name: str, kernel: str, M: int, N: int, K: int, device: str = "cuda") -> Calls | None:
    """The same layer of another project, "W4A16" in groups of 128 or "W8A8" from bfloat16."""
    if find_spec(name) is None or K % GROUP:
        return None
    make = {"gemlite": gemlite_linear, "torchao": torchao_linear}[name]
    x = torch.randn(M, K, device=device, dtype=torch.bfloat16)
    n = min(rounds_of(x.nbytes + N * K * (0.5 if kernel == "W4A16" else 1)), 64)
    layers = [make(kernel, N, K, device) for _ in range(n)]

    def call(layer: Callable[..., Any], x: Tensor) -> Callable[[], Any]:
        return lambda: layer(x)

    return [call(*pair) for pair in zip(layers, copies(x, n), strict=True)]


def gemlite_linear(kernel: str, N: int, K: int, device: str) -> Callable[[Tensor], Tensor]:
    """gemlite 0.6: helper classes that pack codes, or quantize a linear."""
    load_gemlite_tiles()
    helper = importlib.import_module("gemlite.helper")
    if kernel == "W8A8":
        linear = bf16_linear(N, K, device)
        return helper.A8W8_int8_dynamic(device=device, dtype=torch.bfloat16).from_linear(linear)
    codes = torch.randint(0, 16, (N, K), dtype=torch.uint8, device=device)
    scales = torch.rand(N * K // GROUP, 1, device=device).to(torch.bfloat16) * 1e-2
    packer = helper.A16W4_HQQ_INT(device=device, dtype=torch.bfloat16)
    return packer.from_weights(codes, scales, torch.full_like(scales, 8.0))


@cache
def load_gemlite_tiles() -> None:
    """gemlite knows no H200 by name and would search for minutes: it gets what it knows of H100."""
    core = importlib.import_module("gemlite.core")
    if core.selected_tag is None and torch.cuda.get_device_capability() == (9, 0):
        folder = Path(str(core.__file__)).parent / "configs"
        core.GemLiteLinear.load_config(str(folder / "h100.json"))


def torchao_linear(kernel: str, N: int, K: int, device: str) -> Callable[[Tensor], Tensor]:
    """torchao 0.18, compiled, as it wants to be; W4A16 by tinygemm, which needs nothing more."""
    quantization = importlib.import_module("torchao.quantization")
    if kernel == "W8A8":
        config = quantization.Int8DynamicActivationInt8WeightConfig()
    else:
        config = quantization.Int4WeightOnlyConfig(
            group_size=GROUP, int4_packing_format="tile_packed_to_4d"
        )
    linear = bf16_linear(N, K, device)
    quantization.quantize_(linear, config)
    product = compiled_linear() if device == "cuda" else F.linear
    return lambda x: product(x, linear.weight)


@cache
def compiled_linear() -> Callable[..., Any]:
    """One compilation for all weights."""
    return torch.compile(lambda x, weight: F.linear(x, weight))


def bf16_linear(N: int, K: int, device: str) -> nn.Linear:
    return nn.Linear(K, N, bias=False, device=device, dtype=torch.bfloat16).requires_grad_(False)
