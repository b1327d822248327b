"""Scores to packed 4-bit codes of the logarithm of their softmax, and back.

    p_j    = exp(scale * x_j) / sum_i exp(scale * x_i)
    code_j = clamp(round(-steps * log2 p_j), 0, 15)              two to a byte, as `pack_int4`
    back:    2**(-code / steps), and 0 for code 15

The logarithm of the softmax needs one exponential a score, for the sum, and no division. One step
an octave is FQ-ViT's log2 quantizer, arXiv 2111.13824, two are RepQ-ViT's log-sqrt2, arXiv
2212.08254; their largest code stands for zero here.

M rows, K scores in each; a score of -inf, or below -1e15 in base 2, has probability 0.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor

from ._dispatch import backend_of, on_device
from ._int4 import pack_int4, packed_width, unpack_int4
from ._lang import jit, tl
from ._launch import MAX_ROW, cdiv, row_launch
from ._one_part import store_codes
from ._plan import Plan, opaque, planned, row_step
from ._softmax import LOG2_E, LOWEST, Softmax

TOP = 15


def log_softmax_quantize_ref(x: Tensor, steps: int, scale: float) -> Tensor:
    """The definition, in float32."""
    t = (x.float() * (scale * LOG2_E)).clamp(min=LOWEST)
    top = t.amax(-1, keepdim=True)
    total = torch.exp2(t - top).sum(-1, keepdim=True)
    codes = torch.round(steps * (torch.log2(total) - (t - top))).clamp(0, TOP)
    codes = codes.masked_fill(t <= LOWEST, TOP)
    return pack_int4(codes.to(torch.int8))


@jit
def _log_softmax_quantize_kernel(
    x_ptr, q_ptr, M, K, width, stride_xm, multiplier,
    STEPS: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offs_k = tl.arange(0, BLOCK_K)
    mask = (offs_m < M)[:, None] & (offs_k < K)[None, :]
    x_at = offs_m[:, None] * stride_xm + offs_k[None, :]
    t = tl.load(x_ptr + x_at, mask=mask, other=float("-inf")).to(tl.float32) * multiplier
    t = tl.maximum(t, -1e15)
    top = tl.max(t, axis=1)[:, None]
    # channels of the padding of a packed row would count where a row is hidden as a whole
    total = tl.sum(tl.where(mask, tl.exp2(t - top), 0.0), axis=1)[:, None]
    code = STEPS * (tl.log2(total) - (t - top))
    code = tl.where(t > -1e15, code, 15.0)
    code = tl.where(mask, code, 0.0)
    store_codes(q_ptr, code, offs_m, 0, M, width, 0, 15, 0, ROWS, BLOCK_K, True)


@jit
def _log_dequantize_kernel(
    q_ptr, out_ptr, M, K, width, STEPS: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (offs_m < M)[:, None] & (offs_k < K)[None, :]
    byte = offs_k // 128 * 64 + offs_k % 64
    q = tl.load(q_ptr + offs_m[:, None] * width + byte[None, :], mask=mask, other=0).to(tl.int32)
    code = (q >> (offs_k % 128 // 64 * 4)[None, :]) & 15
    p = tl.where(code < 15, tl.exp2(code.to(tl.float32) * (-1.0 / STEPS)), 0.0)
    tl.store(out_ptr + offs_m[:, None] * K + offs_k[None, :], p, mask=mask)


@planned
def _plan(shape: torch.Size, stride: tuple[int, ...], steps: int, scale: float) -> Plan:
    K, M, step = shape[-1], prod(shape[:-1]), row_step(shape, stride)
    if K > MAX_ROW:
        raise ValueError(f"backend 'triton' holds rows of up to {MAX_ROW} scores, got {K}")
    tile, width = row_launch(M, K, at_least=128), packed_width(K)
    return Plan(
        copy=step is None,
        results=[((*shape[:-1], width), torch.uint8)],
        grid=(cdiv(M, tile["ROWS"]),),
        numbers=(M, K, width, K if step is None else step, scale * LOG2_E),
        options={"STEPS": steps, **tile, "enable_fp_fusion": False},
    )


def _empty(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed_width(x.shape[-1])), dtype=torch.uint8)


@opaque(_empty)
def _launch_log_softmax_quantize(x: Tensor, steps: int, scale: float) -> Tensor:
    plan = _plan(x.shape, x.stride(), steps, scale)
    (q,) = plan.empty(x.device)
    with on_device(x):
        _log_softmax_quantize_kernel[plan.grid](
            x.contiguous() if plan.copy else x, q, *plan.numbers, **plan.options
        )
    return q


@planned
def _plan_back(shape: torch.Size, stride: tuple[int, ...], K: int, steps: int) -> Plan:
    if shape[-1] != packed_width(K):
        raise ValueError(f"{K} scores need [..., {packed_width(K)}], got {list(shape)}")
    M, step = prod(shape[:-1]), row_step(shape, stride)
    tile = row_launch(M, K)
    return Plan(
        copy=step is None,
        results=[((*shape[:-1], K), torch.float32)],
        grid=(cdiv(M, tile["ROWS"]), cdiv(K, tile["BLOCK_K"])),
        numbers=(M, K, shape[-1] if step is None else step),
        options={"STEPS": steps, **tile},
    )


def _empty_back(q: Tensor, K: int, _steps: int) -> Tensor:
    return q.new_empty((*q.shape[:-1], K), dtype=torch.float32)


@opaque(_empty_back)
def _launch_log_dequantize(q: Tensor, K: int, steps: int) -> Tensor:
    plan = _plan_back(q.shape, q.stride(), K, steps)
    (out,) = plan.empty(q.device)
    with on_device(q):
        _log_dequantize_kernel[plan.grid](
            q.contiguous() if plan.copy else q, out, *plan.numbers, **plan.options
        )
    return out


def log_softmax_quantize(
    x: Tensor, *, steps: int = 1, scale: float = 1.0, backend: str | None = None
) -> Tensor:
    """The codes of softmax(scale * x) over the last axis.

    Args:
        x: [..., K], float32, float16 or bfloat16.
        steps: an octave, 1 or 2.
        scale: of the scores, positive.

    Returns:
        [..., ceil(K / 128) * 64], uint8; padding is 0.

    Raises:
        ValueError: other steps, a scale that is not positive, rows longer than a program holds.
    """
    Softmax("log2", bits=4, steps=steps)
    if scale <= 0:
        raise ValueError(f"scale must be positive, got {scale}")
    if backend_of(x, backend) != "triton" or not x.numel():
        return log_softmax_quantize_ref(x, steps, scale)
    return _launch_log_softmax_quantize(x, steps, float(scale))


def log_dequantize(q: Tensor, K: int, *, steps: int = 1, backend: str | None = None) -> Tensor:
    """Inverse of `log_softmax_quantize` but for the rounding: probabilities, [..., K] float32."""
    Softmax("log2", bits=4, steps=steps)
    if backend_of(q, backend) == "triton" and q.numel():
        return _launch_log_dequantize(q, K, steps)
    code = (unpack_int4(q, K) & 15).float()
    return torch.exp2(-code / steps).masked_fill(code == TOP, 0.0)
