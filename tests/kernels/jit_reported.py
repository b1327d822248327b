"""Launches that once did not compile, did not fit a card or spilled, each by what was wrong."""

from collections.abc import Iterator
from typing import Any

import torch

from qtk_kernels.codes import Codes
from qtk_kernels.hadamard_quantize import hadamard_quantize
from qtk_kernels.int4_linear import int4_linear
from qtk_kernels.int8_linear import int8_linear
from qtk_kernels.quantized_attention import quantized_attention
from qtk_kernels.weight_only_linear import weight_only_linear
from tests.kernels.jit_cases import TRITON, Case, empty, i8, u8


def _attend(T: int, D: int, dtype: torch.dtype, **options: Any) -> Any:
    q = empty(1, 1, T, D, dtype=dtype)
    return quantized_attention(q, q, q, **options, **TRITON)


def reported() -> Iterator[Case]:
    half = {"out_dtype": torch.bfloat16}
    codes = {"out_codes": Codes(8), "out_step": 0.1, "out_zero_point": 1}
    float4 = {"bits": 4, "in_features": 256}
    yield Case("one token in parts", lambda: int8_linear(
        i8(1, 4096), i8(4096, 4096), empty(4096, 1), x_scale=empty(1, 1), **half, **TRITON
    ))  # fmt: skip
    yield Case("output zero point 1", lambda: int8_linear(
        i8(256, 4096), i8(4096, 4096), empty(4096, 1), x_scale=empty(256, 1), **codes, **TRITON
    ))  # fmt: skip
    yield Case("float32 heads", lambda: _attend(197, 64, torch.float32, softmax="float"), stack=128)
    yield Case("float32, four bits and a zero point", lambda: weight_only_linear(
        empty(40, 256), u8(256, 128), empty(256, 1), None, w_zero_point=empty(256, 1),
        **float4, **TRITON,
    ), stack=128)  # fmt: skip
    yield Case("float32 tokens", lambda: weight_only_linear(
        empty(64, 256), u8(256, 128), empty(256, 1), None, **float4, **TRITON
    ), stack=128)  # fmt: skip
    yield Case("heads of 256 channels", lambda: _attend(
        197, 256, torch.bfloat16, softmax="uniform"
    ), waits=True)  # fmt: skip
    yield Case("float32 heads of 256 channels", lambda: _attend(
        64, 256, torch.float32, softmax="code", causal=True
    ), waits=True)  # fmt: skip
    yield Case(
        "two channels", lambda: hadamard_quantize(empty(3, 2), None, None, Codes(8), **TRITON)
    )
    yield Case("32 tokens of W4A8", lambda: int4_linear(
        i8(32, 4096), u8(4096, 2048), empty(4096, 1), empty(4096), in_features=4096,
        x_scale=empty(32, 1), **half, **TRITON,
    ))  # fmt: skip
