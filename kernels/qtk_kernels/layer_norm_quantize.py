"""Residual add, LayerNorm, shift, scale and quantize in one pass.

    h        = x + residual
    xhat     = (h - mean(h)) / sqrt(var(h) + eps)        per token
    y        = xhat * weight + bias                      per channel
    q, scale = codes of y                                see `codes.py`
    emitted  = xhat * norm_weight + norm_bias  ("norm")  or  h  ("sum")

`weight` and `bias` already hold the layer's gamma and beta, the shift, the channel scale, the step
and the zero point, so quantizing costs nothing beyond LayerNorm itself. `emitted` feeds the
residual stream: "norm" in post-norm models (BERT), "sum" in pre-norm models (OPT, ViT).

M tokens, K channels.
"""

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._lang import entry, jit, larger, rsqrt, tl
from ._launch import cdiv
from ._plan import Plan, opaque, planned, row_step, shape_of
from ._rows import (
    TOKEN,
    append,
    channels_of_part,
    divided,
    largest,
    load_rows,
    none,
    store_rows,
    store_scales,
)
from .codes import Codes, channels_of, check_channels, quantize_ref
from .dispatch import backend_of, on_device
from .packing import pack_int4

EMIT = ("norm", "sum")


def layer_norm_quantize_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual: Tensor | None,
    emit: str | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    codes: Codes,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The definition, in float32.

    Another order of summation moves mean and variance by a few ulp, so codes of two
    implementations may differ by one where y is that close to a rounding boundary.
    """
    K = x.shape[-1:]
    h = x.float() if residual is None else x.float() + residual.float()  # [..., K]
    emitted = None
    if emit == "norm" and norm_weight is not None and norm_bias is not None:
        emitted = F.layer_norm(h, K, norm_weight.float(), norm_bias.float(), eps).to(x.dtype)
    if emit == "sum":
        emitted = h.to(x.dtype)
    q, scale = quantize_ref(F.layer_norm(h, K, weight.float(), bias.float(), eps), codes)
    return q, scale, emitted


@jit
def _load_h(
    x_ptr, residual_ptr, offs_m, start, K, stride_xm, stride_rm,
    GROUP: tl.constexpr, SPAN: tl.constexpr, PACKED: tl.constexpr, FULL: tl.constexpr,
    PART: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    xs = load_rows(x_ptr, offs_m, stride_xm, start, K, GROUP, SPAN, PACKED, FULL, PART, PARTS)
    if residual_ptr is not None:
        rs = load_rows(
            residual_ptr, offs_m, stride_rm, start, K, GROUP, SPAN, PACKED, FULL, PART, PARTS
        )
        hs = none()
        for P in tl.static_range(PARTS):
            hs = append(hs, xs[P] + rs[P])
        xs = hs
    return xs  # PARTS times [ROWS, PART]


@jit
def _sum(hs, PARTS: tl.constexpr):
    total = hs[0]
    for P in tl.static_range(1, PARTS):
        total += hs[P]
    return tl.sum(total, axis=1)[:, None]  # [ROWS, 1]


@jit
def _squares(
    hs, mean, start, K,
    GROUP: tl.constexpr, SPAN: tl.constexpr, PACKED: tl.constexpr, FULL: tl.constexpr,
    PART: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Sum of squared deviations, [ROWS, 1]; masked channels would add mean squared each."""
    total = 0.0
    for P in tl.static_range(PARTS):
        d = hs[P] - mean
        if not FULL:
            _, inside = channels_of_part(start, K, P, GROUP, SPAN, PACKED, PART)
            d = tl.where(inside[None, :], d, 0.0)
        total = tl.fma(d, d, total) if P else d * d
    return tl.sum(total, axis=1)[:, None]


@jit
def _affine(
    hs, mean, rstd, weight_ptr, bias_ptr, start, K,
    GROUP: tl.constexpr, SPAN: tl.constexpr, PACKED: tl.constexpr, FULL: tl.constexpr,
    PART: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """xhat * weight + bias; masked channels are 0."""
    one = tl.arange(0, 1)
    ws = load_rows(weight_ptr, one, 0, start, K, GROUP, SPAN, PACKED, FULL, PART, PARTS)
    bs = load_rows(bias_ptr, one, 0, start, K, GROUP, SPAN, PACKED, FULL, PART, PARTS)
    ys = none()
    for P in tl.static_range(PARTS):
        ys = append(ys, tl.fma((hs[P] - mean) * rstd, ws[P], bs[P]))
    return ys


@jit
def _emit(
    emitted_ptr, hs, mean, rstd, norm_weight_ptr, norm_bias_ptr, offs_m, start, K,
    GROUP: tl.constexpr, SPAN: tl.constexpr, PACKED: tl.constexpr, FULL: tl.constexpr,
    PART: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Writes h, or the norm if there are weights for it."""
    if norm_weight_ptr is not None:
        hs = _affine(
            hs, mean, rstd, norm_weight_ptr, norm_bias_ptr, start, K,
            GROUP, SPAN, PACKED, FULL, PART, PARTS,
        )  # fmt: skip
    for P in tl.static_range(PARTS):
        offs_k, mask = channels_of_part(start, K, P, GROUP, SPAN, PACKED, PART)
        at = emitted_ptr + offs_m[:, None] * K + offs_k[None, :]
        if FULL:
            tl.store(at, hs[P])
        else:
            tl.store(at, hs[P], mask=mask[None, :])


@jit
def _finish(
    hs, mean, rstd, limits,
    weight_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr, q_ptr, scale_ptr, emitted_ptr,
    offs_m, start, K, G, width, clip,
    GROUP: tl.constexpr, SPAN: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr,
    OFFSET: tl.constexpr, PACKED: tl.constexpr, FULL: tl.constexpr, KNOWN: tl.constexpr,
    ROWS: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Writes everything there is to write about one tile; KNOWN: the limits are."""
    if emitted_ptr is not None:
        _emit(
            emitted_ptr, hs, mean, rstd, norm_weight_ptr, norm_bias_ptr, offs_m, start, K,
            GROUP, SPAN, PACKED, FULL, PART, PARTS,
        )  # fmt: skip
    ys = _affine(
        hs, mean, rstd, weight_ptr, bias_ptr, start, K, GROUP, SPAN, PACKED, FULL, PART, PARTS
    )
    if GROUP:
        if not KNOWN:
            limits = largest(ys, clip, GROUP, SPAN, PACKED, ROWS, PART, PARTS)
            store_scales(
                scale_ptr, limits, offs_m, start, G, GROUP, SPAN, PACKED, QMAX, PART, PARTS
            )
        ys = divided(ys, limits, GROUP, SPAN, PACKED, QMAX, ROWS, PART, PARTS)
    store_rows(
        q_ptr, ys, offs_m, start, K, width,
        GROUP, SPAN, PACKED, FULL, QMIN, QMAX, OFFSET, PART, PARTS,
    )  # fmt: skip


@entry
def _layer_norm_quantize_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr,
    q_ptr, scale_ptr, emitted_ptr,
    M, K, G, width, stride_xm, stride_rm, eps, clip,
    GROUP: tl.constexpr, SPAN: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr,
    OFFSET: tl.constexpr, PACKED: tl.constexpr, WALK: tl.constexpr, FULL: tl.constexpr,
    ROWS: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    CHANNELS: tl.constexpr = PART * PARTS // SPAN * GROUP if GROUP > 0 else PART * PARTS
    offs_m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offs_m = tl.minimum(offs_m, M - 1)  # the last row may be written several times, the same
    hs = _load_h(
        x_ptr, residual_ptr, offs_m, 0, K, stride_xm, stride_rm,
        GROUP, SPAN, PACKED, FULL, PART, PARTS,
    )  # fmt: skip
    total = _sum(hs, PARTS)
    if WALK:  # a row longer than a tile is read once for each of its sums
        for start in range(CHANNELS, K, CHANNELS):
            hs = _load_h(
                x_ptr, residual_ptr, offs_m, start, K, stride_xm, stride_rm,
                GROUP, SPAN, PACKED, FULL, PART, PARTS,
            )  # fmt: skip
            total += _sum(hs, PARTS)
    mean = total / K
    if WALK:
        squares = tl.zeros([ROWS, 1], tl.float32)
        for start in range(0, K, CHANNELS):
            hs = _load_h(
                x_ptr, residual_ptr, offs_m, start, K, stride_xm, stride_rm,
                GROUP, SPAN, PACKED, FULL, PART, PARTS,
            )  # fmt: skip
            squares += _squares(hs, mean, start, K, GROUP, SPAN, PACKED, FULL, PART, PARTS)
    else:
        squares = _squares(hs, mean, 0, K, GROUP, SPAN, PACKED, FULL, PART, PARTS)
    rstd = rsqrt(squares / K + eps)
    limit = tl.zeros([ROWS, 1], tl.float32)
    if WALK:
        if GROUP == TOKEN:
            for start in range(0, K, CHANNELS):
                hs = _load_h(
                    x_ptr, residual_ptr, offs_m, start, K, stride_xm, stride_rm,
                    GROUP, SPAN, PACKED, FULL, PART, PARTS,
                )  # fmt: skip
                ys = _affine(
                    hs, mean, rstd, weight_ptr, bias_ptr, start, K,
                    GROUP, SPAN, PACKED, FULL, PART, PARTS,
                )  # fmt: skip
                top = largest(ys, clip, GROUP, SPAN, PACKED, ROWS, PART, PARTS)
                limit = larger(limit, top)
            store_scales(scale_ptr, limit, offs_m, 0, G, GROUP, SPAN, PACKED, QMAX, PART, PARTS)
        for start in range(0, K, CHANNELS):
            hs = _load_h(
                x_ptr, residual_ptr, offs_m, start, K, stride_xm, stride_rm,
                GROUP, SPAN, PACKED, FULL, PART, PARTS,
            )  # fmt: skip
            _finish(
                hs, mean, rstd, limit,
                weight_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr, q_ptr, scale_ptr, emitted_ptr,
                offs_m, start, K, G, width, clip,
                GROUP, SPAN, QMIN, QMAX, OFFSET, PACKED, FULL, GROUP == TOKEN, ROWS, PART, PARTS,
            )  # fmt: skip
    else:
        _finish(
            hs, mean, rstd, limit,
            weight_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr, q_ptr, scale_ptr, emitted_ptr,
            offs_m, 0, K, G, width, clip,
            GROUP, SPAN, QMIN, QMAX, OFFSET, PACKED, FULL, False, ROWS, PART, PARTS,
        )  # fmt: skip


def _check(
    shape: torch.Size, weight: torch.Size, bias: torch.Size, residual: torch.Size | None,
    emit: str | None, norm_weight: torch.Size | None, norm_bias: torch.Size | None,
) -> None:  # fmt: skip
    check_channels(shape, weight=weight, bias=bias, norm_weight=norm_weight, norm_bias=norm_bias)
    if residual is not None and residual != shape:
        raise ValueError(f"residual must be {list(shape)} as x is, got {list(residual)}")
    if emit is not None and emit not in EMIT:
        raise ValueError(f"emit must be None or one of {EMIT}, got {emit!r}")
    if emit == "norm" and (norm_weight is None or norm_bias is None):
        raise ValueError("emit='norm' needs norm_weight and norm_bias, got None")


@planned
def _plan(
    shape: torch.Size, stride: tuple[int, ...], residual_stride: tuple[int, ...] | None,
    dtype: torch.dtype, eps: float, vectors: tuple[Any, ...], wanted: Codes,
) -> Plan:  # fmt: skip
    _check(shape, *vectors)
    K, M = shape[-1], prod(shape[:-1])
    codes = wanted.written(K)
    step = row_step(shape, stride)
    r_step = 0 if residual_stride is None else row_step(shape, residual_stride)
    copy = step is None or r_step is None
    if step is None or r_step is None:
        step = r_step = K
    tile, results = codes.launch(M, K), codes.results(shape)
    G = 1 if codes.static else results[1][0][-1]
    numbers = M, K, G, results[0][0][-1], step, r_step, eps, codes.clip
    return Plan(
        copy,
        results if vectors[3] is None else [*results, (tuple(shape), dtype)],
        (cdiv(M, tile["ROWS"]),),
        numbers,
        # a fused sum only moves y within the bound that another order of summation needs
        {"WALK": channels_of(tile) < K, **tile, "enable_fp_fusion": True},
        pack=wanted.packed and not codes.packed,
    )  # fmt: skip


def _empty(
    x: Tensor, _w: Any, _b: Any, _eps: Any, codes: Codes, _r: Any, emit: str | None, _nw: Any,
    _nb: Any,
) -> list[Tensor]:  # fmt: skip
    found = codes.empty(x)
    return found if emit is None else [*found, x.new_empty(x.shape)]


@opaque(_empty)
def _launch_layer_norm_quantize(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, codes: Codes, residual: Tensor | None,
    emit: str | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """q, then the scale unless it is static, then what is emitted, if anything is."""
    vectors = (weight.shape, bias.shape, shape_of(residual), emit, shape_of(norm_weight),
               shape_of(norm_bias))  # fmt: skip
    plan = _plan(
        x.shape, x.stride(), None if residual is None else residual.stride(), x.dtype, eps,
        vectors, codes,
    )  # fmt: skip
    results = plan.empty(x.device)
    if plan.copy:
        x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    norm: tuple[Tensor | None, ...] = (None, None)
    if emit == "norm" and norm_weight is not None and norm_bias is not None:
        norm = norm_weight.contiguous(), norm_bias.contiguous()
    with on_device(x, residual, weight, bias, *norm):
        _layer_norm_quantize_kernel[plan.grid](
            x, residual, weight.contiguous(), bias.contiguous(),
            *norm,
            results[0], None if codes.static else results[1],
            None if emit is None else results[-1],
            *plan.numbers, **plan.options,
        )  # fmt: skip
    return [pack_int4(results[0]), *results[1:]] if plan.pack else results


def layer_norm_quantize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    codes: Codes,
    *,
    residual: Tensor | None = None,
    emit: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Normalizes x + residual and quantizes the result.

    Args:
        x: [..., K], float32, float16 or bfloat16.
        weight, bias: [K], the affine map from the normalized value to the grid.
        eps: added to the variance.
        codes: what to write.
        residual: [..., K], as x.
        emit: None, "norm" or "sum", what to return for the residual stream.
        norm_weight, norm_bias: [K], the affine map of "norm".

    Returns:
        q: [..., K], int8 or uint8, or [..., ceil(K / 128) * 64], uint8, if packed.
        scale: None (static), or [..., 1] or [..., G], float32; nan where a token or group holds
            nan. A static grid has no scale to say so, and its code of a nan is any.
        emitted: None, or [..., K] in x's dtype.

    Raises:
        ValueError: a shape that is not as above, or an unknown `emit`.
    """
    if backend_of(x, backend) == "triton" and x.numel():
        q, *rest = _launch_layer_norm_quantize(
            x, weight, bias, eps, codes, residual, emit, norm_weight, norm_bias
        )
        return q, None if codes.static else rest[0], None if emit is None else rest[-1]
    vectors = map(shape_of, (norm_weight, norm_bias))
    _check(x.shape, weight.shape, bias.shape, shape_of(residual), emit, *vectors)
    return layer_norm_quantize_ref(
        x, weight, bias, eps, residual, emit, norm_weight, norm_bias, codes
    )
