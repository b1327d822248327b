"""Tensors of more than 2^31 elements: what a 32-bit offset would get wrong.

    python -m tests.gpu.huge             needs some 40 GB of a GPU's memory

Rows of every op are independent: the last ones of a huge call must equal a call of them alone.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qtk_kernels.codes import Codes
from qtk_kernels.int8_linear import int8_linear
from qtk_kernels.layer_norm_quantize import layer_norm_quantize
from qtk_kernels.packing import pack_int4
from qtk_kernels.quantized_attention import quantized_attention
from qtk_kernels.shift_scale_quantize import shift_scale_quantize
from qtk_kernels.weight_only_linear import weight_only_linear
from tests.gpu.compare import answers

DEVICE = "cuda"
FAR = 2**31 + 2**16  # elements
LAST = 64  # rows that are computed alone, too


def floats(*shape: int) -> Tensor:
    """bfloat16, different from row to row."""
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)


def rows_of(width: int) -> int:
    return -(-FAR // width)


def same(got: Tensor | None, want: Tensor | None) -> None:
    assert got is want is None or torch.equal(got, want), "the last rows differ"  # type: ignore[arg-type]


def ends(op: Callable[[Tensor], tuple[Tensor | None, ...]], x: Tensor) -> None:
    """The last rows of all of x, and of them alone."""
    for whole, alone in zip(op(x), op(x[-LAST:].clone()), strict=True):
        same(None if whole is None else whole[-LAST:], alone)


def quantizers() -> None:
    K = 4096
    x, a = floats(rows_of(K), K), torch.rand(K, device=DEVICE)
    codes = Codes(8, "token")
    ends(lambda x: shift_scale_quantize(x, a, a, codes, backend="triton"), x)
    ends(lambda x: layer_norm_quantize(x, a, a, 1e-5, codes, backend="triton")[:2], x)


def int8_inputs() -> None:
    K, N = 16384, 64
    x = torch.randint(-128, 128, (rows_of(K), K), dtype=torch.int8, device=DEVICE)
    w, scale = x[:N].clone(), torch.rand(N, 1, device=DEVICE)
    ends(lambda x: (int8_linear(x, w, scale, backend="triton"),), x)


def int8_results() -> None:
    K, N = 64, 16384
    x = torch.randint(-128, 128, (rows_of(N), K), dtype=torch.int8, device=DEVICE)
    w, scale = x[:N].clone(), torch.rand(N, 1, device=DEVICE)
    ends(lambda x: (int8_linear(x, w, scale, out_dtype=torch.bfloat16, backend="triton"),), x)


def weight_only() -> None:
    K, N = 8192, 64
    x, w = floats(rows_of(K), K), torch.randint(-8, 8, (N, K), dtype=torch.int8, device=DEVICE)
    packed, scale = pack_int4(w), torch.rand(N, 1, device=DEVICE)
    options: dict[str, Any] = {"bits": 4, "in_features": K, "backend": "triton"}
    ends(lambda x: (weight_only_linear(x, packed, scale, None, **options),), x)


def attention() -> None:
    T, H, D = 128, 8, 64
    x = torch.randint(-128, 128, (-(-FAR // (T * H * D)), H, T, D), dtype=torch.int8, device=DEVICE)
    v = x.transpose(2, 3)[:, :, :D, :].contiguous().transpose(2, 3)

    def run(q: Tensor, v: Tensor) -> Tensor:
        scale = torch.full((len(q), H, 1), 1e-2, device=DEVICE)
        return quantized_attention(
            q, q, v, q_scale=scale, k_scale=scale, v_scale=scale, softmax="code", steps=4,
            out_dtype=torch.bfloat16, backend="triton",
        )  # fmt: skip

    same(run(x, v)[-2:], run(x[-2:].clone(), v[-2:]))


CASES = (quantizers, int8_inputs, int8_results, weight_only, attention)


def main() -> int:
    failed = 0
    for case in CASES:
        try:
            case()
            print(f"huge {case.__name__}: equal", flush=True)
        except Exception as error:
            failed += 1
            print(f"huge {case.__name__}: {type(error).__name__}: {error}", flush=True)
            if not answers():
                break
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
