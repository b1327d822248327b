"""Shift, scale and quantize activations in one pass.

    y        = x * multiplier + offset       per channel: SmoothQuant, Outlier Suppression+
    q, scale = codes of y                    see `_codes.py`

Reads x once and writes a byte (or half of one) per element; eager PyTorch makes eight passes.

M tokens, K channels. With a static step D and zero point p, a shift z and a channel scale s, the
caller passes multiplier = 1 / (s D) and offset = p - z / (s D).
"""

from math import prod
from typing import Any

import torch
from torch import Tensor

from ._codes import Codes, Granularity, channels_of, check_channels, quantize_ref
from ._dispatch import backend_of, on_device
from ._lang import (
    activate_tile,
    dynamic_divide,
    dynamic_limit,
    jit,
    lanes,
    round_codes,
    store_codes,
    store_scale,
    tl,
)
from ._launch import cdiv
from ._plan import Plan, opaque, planned, row_step, shape_of


def shift_scale_quantize_ref(
    x: Tensor, multiplier: Tensor | None, offset: Tensor | None, codes: Codes
) -> tuple[Tensor, Tensor | None]:
    """The definition, in float32: a multiplication, then an addition, each rounded."""
    y = x.float().clone() if multiplier is None else x.float() * multiplier.float()  # [..., K]
    if offset is not None:
        y += offset.float()
    return quantize_ref(y, codes)


@jit
def load_y(
    x_ptr, multiplier_ptr, offset_ptr, offs_m, start, M, K, stride_xm,
    GROUP: tl.constexpr, SPAN: tl.constexpr, BLOCK_K: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    offs_k, mask_k = lanes(start, K, GROUP, SPAN, BLOCK_K)
    mask = (offs_m < M)[:, None] & mask_k[None, :]
    x_at = offs_m[:, None] * stride_xm + offs_k[None, :]
    y = tl.load(x_ptr + x_at, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK_K]
    y = activate_tile(y, ACTIVATION)
    # as [1, BLOCK_K] the vectors share the layout of x, and need no way through shared memory
    if multiplier_ptr is not None:
        at = multiplier_ptr + offs_k[None, :]
        y = y * tl.load(at, mask=mask_k[None, :], other=0.0).to(tl.float32)
    if offset_ptr is not None:
        at = offset_ptr + offs_k[None, :]
        y = y + tl.load(at, mask=mask_k[None, :], other=0.0).to(tl.float32)
    return y  # masked channels are 0: they cannot win a maximum, and pack as 0


@jit
def _shift_scale_quantize_kernel(
    x_ptr, multiplier_ptr, offset_ptr, q_ptr, scale_ptr,
    M, K, G, width, stride_xm, clip,
    GROUP: tl.constexpr, SPAN: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr,
    SHIFT: tl.constexpr, PACKED: tl.constexpr, WALK: tl.constexpr, ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    if WALK:  # a token longer than a tile: once for its scale, once for its codes
        limit = tl.zeros([ROWS, 1], tl.float32)
        for start in range(0, K, BLOCK_K):
            y = load_y(
                x_ptr, multiplier_ptr, offset_ptr, offs_m, start, M, K, stride_xm,
                GROUP, SPAN, BLOCK_K, ACTIVATION,
            )  # fmt: skip
            limit = tl.maximum(limit, dynamic_limit(y, clip, ROWS, BLOCK_K, BLOCK_K))
        store_scale(scale_ptr, limit, offs_m, M, G, 0, 1, QMAX)
        for start in range(0, K, BLOCK_K):
            y = load_y(
                x_ptr, multiplier_ptr, offset_ptr, offs_m, start, M, K, stride_xm,
                GROUP, SPAN, BLOCK_K, ACTIVATION,
            )  # fmt: skip
            y = dynamic_divide(y, limit, ROWS, BLOCK_K, BLOCK_K, QMAX)
            codes = round_codes(y, QMIN * 1.0, QMAX * 1.0) + SHIFT
            store_codes(q_ptr, codes, offs_m, start, M, width, ROWS, BLOCK_K, PACKED, GROUP, SPAN)
    else:
        first = 0  # of the groups
        start = tl.program_id(1) * BLOCK_K
        if GROUP:
            first = tl.program_id(1) * (BLOCK_K // SPAN)
            start = first * GROUP
        y = load_y(
            x_ptr, multiplier_ptr, offset_ptr, offs_m, start, M, K, stride_xm,
            GROUP, SPAN, BLOCK_K, ACTIVATION,
        )  # fmt: skip
        if GROUP:
            limit = dynamic_limit(y, clip, ROWS, BLOCK_K, SPAN)
            store_scale(scale_ptr, limit, offs_m, M, G, first, BLOCK_K // SPAN, QMAX)
            y = dynamic_divide(y, limit, ROWS, BLOCK_K, SPAN, QMAX)
        codes = round_codes(y, QMIN * 1.0, QMAX * 1.0) + SHIFT
        store_codes(q_ptr, codes, offs_m, start, M, width, ROWS, BLOCK_K, PACKED, GROUP, SPAN)


@planned
def _plan(
    shape: torch.Size,
    stride: tuple[int, ...],
    multiplier: torch.Size | None,
    offset: torch.Size | None,
    activation: str,
    *spelled: Any,
) -> Plan:
    check_channels(shape, multiplier=multiplier, offset=offset)
    codes = Codes.of(*spelled)
    K, M = shape[-1], prod(shape[:-1])
    step, results = row_step(shape, stride), codes.results(shape)
    tile = codes.launch(M, K)
    walk = codes.granularity == "token" and tile["BLOCK_K"] < K
    G = 1 if codes.static else results[1][0][-1]
    return Plan(
        copy=step is None,
        results=results,
        grid=(cdiv(M, tile["ROWS"]), 1 if walk else cdiv(K, channels_of(tile))),
        numbers=(M, K, G, results[0][0][-1], K if step is None else step, codes.clip),
        options={
            "WALK": walk, "ACTIVATION": activation, **tile,
            "enable_fp_fusion": False,  # an fma before the rounding differs from the reference
        },
    )  # fmt: skip


def _empty(x: Tensor, _m: Any, _o: Any, _activation: str, *spelled: Any) -> list[Tensor]:
    return Codes.of(*spelled).empty(x)


@opaque(_empty)
def launch_shift_scale_quantize(
    x: Tensor, multiplier: Tensor | None, offset: Tensor | None, activation: str,
    bits: int, granularity: str, signed: bool, packed: bool, clip: float,
) -> list[Tensor]:  # fmt: skip
    """Runs the kernel, with an activation function ("" for none) in front."""
    plan = _plan(
        x.shape, x.stride(), shape_of(multiplier), shape_of(offset), activation,
        bits, granularity, signed, packed, clip,
    )  # fmt: skip
    results = plan.empty(x.device)
    with on_device(x):
        _shift_scale_quantize_kernel[plan.grid](
            x.contiguous() if plan.copy else x,
            None if multiplier is None else multiplier.contiguous(),
            None if offset is None else offset.contiguous(),
            results[0], None if len(results) == 1 else results[1],
            *plan.numbers, **plan.options,
        )  # fmt: skip
    return results


def shift_scale_quantize(
    x: Tensor,
    multiplier: Tensor | None = None,
    offset: Tensor | None = None,
    *,
    bits: int,
    granularity: Granularity = "tensor",
    signed: bool = True,
    packed: bool = False,
    clip: float = 1.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Quantizes x * multiplier + offset.

    Args:
        x: [..., K], float32, float16 or bfloat16.
        multiplier: [K], or None for 1.
        offset: [K], or None for 0.
        bits: 2 to 8.
        granularity: "tensor" (static), "token", or the size of a group of channels.
        signed: int8 codes, else uint8.
        packed: two 4-bit codes a byte, in the layout of `pack_int4`.
        clip: the part of the dynamic range to keep, in (0, 1].

    Returns:
        q: [..., K], int8 or uint8, or [..., ceil(K / 128) * 64], uint8, if packed.
        scale: None (static), or [..., 1] or [..., G], float32.
    """
    if backend_of(x, backend) == "triton" and x.numel():
        q, *scale = launch_shift_scale_quantize(
            x, multiplier, offset, "", bits, str(granularity), signed, packed, clip
        )
        return q, scale[0] if scale else None
    check_channels(x.shape, multiplier=shape_of(multiplier), offset=shape_of(offset))
    codes = Codes(bits, granularity, signed, packed, clip)
    return shift_scale_quantize_ref(x, multiplier, offset, codes)
