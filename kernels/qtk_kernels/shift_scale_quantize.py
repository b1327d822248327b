"""Shift, scale and quantize activations in one pass, after an activation function if asked for.

    y        = activation(x) * multiplier + offset    per channel: SmoothQuant, Outlier Suppression+
    q, scale = codes of y                             see `codes.py`

Reads x once and writes a byte (or half of one) per element; eager PyTorch makes eight passes.

M tokens, K channels. With a static step D and zero point p, a shift z and a channel scale s, the
caller passes multiplier = 1 / (s D) and offset = p - z / (s D).
"""

from math import prod
from typing import Any

import torch
from torch import Tensor

from ._lang import activate_tile, entry, jit, larger, tl
from ._launch import cdiv
from ._plan import Plan, opaque, planned, row_step, shape_of
from ._rows import append, divided, largest, load_rows, none, store_rows, store_scales
from .activation import activate, check_activation
from .codes import Codes, channels_of, check_channels, quantize_ref
from .dispatch import backend_of, on_device
from .packing import pack_int4


def shift_scale_quantize_ref(
    x: Tensor, multiplier: Tensor | None, offset: Tensor | None, codes: Codes,
    activation: str | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The definition, in float32: a multiplication, then an addition, each rounded."""
    if activation is None:  # x may be float32 already, and is not overwritten
        y = x.float().clone() if multiplier is None else x.float() * multiplier.float()  # [..., K]
    else:
        y = activate(x.float(), activation)
        if multiplier is not None:
            y *= multiplier.float()
    if offset is not None:
        y += offset.float()
    return quantize_ref(y, codes)


@jit
def _load_y(
    x_ptr, multiplier_ptr, offset_ptr, offs_m, start, K, stride_xm,
    GROUP: tl.constexpr, SPAN: tl.constexpr, PACKED: tl.constexpr, FULL: tl.constexpr,
    PART: tl.constexpr, PARTS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """PARTS tensors [ROWS, PART]; masked channels are 0: they win no maximum, and pack as 0."""
    one = tl.arange(0, 1)
    xs = load_rows(
        x_ptr, offs_m, stride_xm, start, K, GROUP, SPAN, PACKED, FULL, PART, PARTS
    )  # fmt: skip
    ys = none()
    for P in tl.static_range(PARTS):
        ys = append(ys, activate_tile(xs[P], ACTIVATION))
    if multiplier_ptr is not None:
        vs = load_rows(multiplier_ptr, one, 0, start, K, GROUP, SPAN, PACKED, FULL, PART, PARTS)
        products = none()
        for P in tl.static_range(PARTS):
            products = append(products, ys[P] * vs[P])
        ys = products
    if offset_ptr is not None:
        vs = load_rows(offset_ptr, one, 0, start, K, GROUP, SPAN, PACKED, FULL, PART, PARTS)
        sums = none()
        for P in tl.static_range(PARTS):
            sums = append(sums, ys[P] + vs[P])
        ys = sums
    return ys


@entry
def _shift_scale_quantize_kernel(
    x_ptr, multiplier_ptr, offset_ptr, q_ptr, scale_ptr,
    M, K, G, width, stride_xm, clip,
    GROUP: tl.constexpr, SPAN: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr,
    OFFSET: tl.constexpr, PACKED: tl.constexpr, WALK: tl.constexpr, ACTIVATION: tl.constexpr,
    FULL: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offs_m = tl.minimum(offs_m, M - 1)  # the last row may be written several times, the same
    BLOCK_K: tl.constexpr = PART * PARTS
    start = tl.program_id(1) * (BLOCK_K // SPAN * GROUP if GROUP > 0 else BLOCK_K)
    if WALK:  # a token longer than a tile: once for its scale, once for its codes
        limit = tl.zeros([ROWS, 1], tl.float32)
        for at in range(0, K, BLOCK_K):
            ys = _load_y(
                x_ptr, multiplier_ptr, offset_ptr, offs_m, at, K, stride_xm,
                GROUP, SPAN, PACKED, FULL, PART, PARTS, ACTIVATION,
            )  # fmt: skip
            limit = larger(limit, largest(ys, clip, GROUP, SPAN, PACKED, ROWS, PART, PARTS))
        store_scales(scale_ptr, limit, offs_m, 0, G, GROUP, SPAN, PACKED, QMAX, PART, PARTS)
        for at in range(0, K, BLOCK_K):
            ys = _load_y(
                x_ptr, multiplier_ptr, offset_ptr, offs_m, at, K, stride_xm,
                GROUP, SPAN, PACKED, FULL, PART, PARTS, ACTIVATION,
            )  # fmt: skip
            codes = divided(ys, limit, GROUP, SPAN, PACKED, QMAX, ROWS, PART, PARTS)
            store_rows(
                q_ptr, codes, offs_m, at, K, width,
                GROUP, SPAN, PACKED, FULL, QMIN, QMAX, OFFSET, PART, PARTS,
            )  # fmt: skip
    else:
        ys = _load_y(
            x_ptr, multiplier_ptr, offset_ptr, offs_m, start, K, stride_xm,
            GROUP, SPAN, PACKED, FULL, PART, PARTS, ACTIVATION,
        )  # fmt: skip
        if GROUP:
            limits = largest(ys, clip, GROUP, SPAN, PACKED, ROWS, PART, PARTS)
            store_scales(
                scale_ptr, limits, offs_m, start, G, GROUP, SPAN, PACKED, QMAX, PART, PARTS
            )
            ys = divided(ys, limits, GROUP, SPAN, PACKED, QMAX, ROWS, PART, PARTS)
        store_rows(
            q_ptr, ys, offs_m, start, K, width,
            GROUP, SPAN, PACKED, FULL, QMIN, QMAX, OFFSET, PART, PARTS,
        )  # fmt: skip


@planned
def _plan(
    shape: torch.Size, stride: tuple[int, ...], multiplier: torch.Size | None,
    offset: torch.Size | None, wanted: Codes, activation: str | None,
) -> Plan:  # fmt: skip
    check_activation(activation)
    check_channels(shape, multiplier=multiplier, offset=offset)
    K, M = shape[-1], prod(shape[:-1])
    codes = wanted.written(K)
    step, results = row_step(shape, stride), codes.results(shape)
    tile = codes.launch(M, K)
    walk = codes.granularity == "token" and channels_of(tile) < K
    G = 1 if codes.static else results[1][0][-1]
    return Plan(
        copy=step is None,
        results=results,
        grid=(cdiv(M, tile["ROWS"]), 1 if walk else cdiv(K, channels_of(tile))),
        numbers=(M, K, G, results[0][0][-1], K if step is None else step, codes.clip),
        options={
            "WALK": walk, "ACTIVATION": activation or "", **tile,
            "enable_fp_fusion": False,  # an fma before the rounding differs from the reference
        },
        pack=wanted.packed and not codes.packed,
    )  # fmt: skip


def _empty(x: Tensor, _m: Any, _o: Any, codes: Codes, _activation: Any) -> list[Tensor]:
    return codes.empty(x)


@opaque(_empty)
def launch_shift_scale_quantize(
    x: Tensor, multiplier: Tensor | None, offset: Tensor | None, codes: Codes,
    activation: str | None,
) -> list[Tensor]:  # fmt: skip
    """Runs the kernel."""
    plan = _plan(x.shape, x.stride(), shape_of(multiplier), shape_of(offset), codes, activation)
    results = plan.empty(x.device)
    with on_device(x, multiplier, offset):
        _shift_scale_quantize_kernel[plan.grid](
            x.contiguous() if plan.copy else x,
            None if multiplier is None else multiplier.contiguous(),
            None if offset is None else offset.contiguous(),
            results[0], None if len(results) == 1 else results[1],
            *plan.numbers, **plan.options,
        )  # fmt: skip
    return [pack_int4(results[0]), *results[1:]] if plan.pack else results


def shift_scale_quantize(
    x: Tensor,
    multiplier: Tensor | None,
    offset: Tensor | None,
    codes: Codes,
    *,
    activation: str | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Quantizes activation(x) * multiplier + offset.

    Args:
        x: [..., K], float32, float16 or bfloat16.
        multiplier: [K], or None for 1.
        offset: [K], or None for 0.
        codes: what to write.
        activation: None or a name in `activation.ACTIVATIONS`.

    Returns:
        q: [..., K], int8 or uint8, or [..., ceil(K / 128) * 64], uint8, if packed.
        scale: None (static), or [..., 1] or [..., G], float32; nan where a token or group holds
            nan. A static grid has no scale to say so, and its code of a nan is any.

    Raises:
        ValueError: an unknown activation, or a vector that is not [K].
    """
    if backend_of(x, backend) == "triton" and x.numel():
        q, *scale = launch_shift_scale_quantize(x, multiplier, offset, codes, activation)
        return q, scale[0] if scale else None
    check_activation(activation)
    check_channels(x.shape, multiplier=shape_of(multiplier), offset=shape_of(offset))
    return shift_scale_quantize_ref(x, multiplier, offset, codes, activation)
