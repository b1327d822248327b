"""Shift, scale, rotate by a block-diagonal Hadamard matrix, scale again and quantize in one pass.

    u        = x * multiplier + offset                          per channel
    y        = blockdiag(R) u                                   R of size block, see `hadamard.py`
    q, scale = codes of y * out_multiplier + out_offset         see `codes.py`

A static grid has its step D and its zero point p in out_multiplier = 1 / D and out_offset = p.

M tokens, K channels, K a multiple of block; block = blocks * f * p, f and p orders of Hadamard
matrices. Where f * p is a power of two the kernel adds and subtracts in log2(f * p) stages; else
it multiplies by the two small matrices, a whole token at a time, where the channels then lie in
order (768 = 24 * 32 and 2560 = 40 * 64 do, 384 = 16 * 24 does not); where not, or where groups have
another size than a power of two, PyTorch rotates, and one pass does the rest.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor

from ._lang import entry, jit, tl
from ._launch import MAX_ROW, cdiv, next_power_of_2
from ._one_part import dynamic_divide, dynamic_limit, lanes, store_codes, store_scale
from ._plan import Plan, opaque, planned, row_step, shape_of
from .codes import Codes, channels_of, check_channels, quantize_ref
from .dispatch import backend_of, on_device
from .hadamard import rotate, signs_on, split
from .shift_scale_quantize import launch_shift_scale_quantize


def check_block(K: int, block: int) -> None:
    if block < 1 or K % block:
        raise ValueError(f"block must divide {K}, got {block}")


def _check(
    shape: torch.Size, block: int, multiplier: torch.Size | None, offset: torch.Size | None,
    out_multiplier: torch.Size | None, out_offset: torch.Size | None,
) -> None:  # fmt: skip
    check_channels(
        shape, multiplier=multiplier, offset=offset, out_multiplier=out_multiplier,
        out_offset=out_offset,
    )  # fmt: skip
    check_block(shape[-1], block)


def hadamard(x: Tensor, block: int | None = None) -> Tensor:
    """Applies blockdiag(R) to the last axis, in float32.

    Args:
        x: [..., K].
        block: divides K; K itself if None.
    """
    check_block(x.shape[-1], block or x.shape[-1])
    return rotate(x.float().unflatten(-1, (-1, block or x.shape[-1]))).flatten(-2)


def hadamard_quantize_ref(
    x: Tensor,
    multiplier: Tensor | None,
    offset: Tensor | None,
    block: int,
    out_multiplier: Tensor | None,
    out_offset: Tensor | None,
    codes: Codes,
) -> tuple[Tensor, Tensor | None]:
    """The definition, in float32.

    Another order of summation moves y by a few ulp of the largest channel, so codes of two
    implementations may differ by one where y is that close to a rounding boundary.
    """
    u = x.float() if multiplier is None else x.float() * multiplier.float()
    u = u if offset is None else u + offset.float()
    y = hadamard(u, block)  # x itself, where there is nothing to rotate
    y = y.clone() if out_multiplier is None else y * out_multiplier.float()
    if out_offset is not None:
        y += out_offset.float()
    return quantize_ref(y, codes)


@jit
def _load_u(
    x_ptr, multiplier_ptr, offset_ptr, offs_m, offs_k, mask_k, M, stride_xm
):  # fmt: skip
    """x * multiplier + offset, [ROWS, BLOCK_K]; 0 where masked."""
    mask = (offs_m < M)[:, None] & mask_k[None, :]
    u = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :], mask=mask, other=0.0)
    u = u.to(tl.float32)
    # as [1, BLOCK_K] the vectors share the layout of x, and need no way through shared memory
    if multiplier_ptr is not None:
        at = multiplier_ptr + offs_k[None, :]
        u = u * tl.load(at, mask=mask_k[None, :], other=0.0).to(tl.float32)
    if offset_ptr is not None:
        at = offset_ptr + offs_k[None, :]
        u = u + tl.load(at, mask=mask_k[None, :], other=0.0).to(tl.float32)
    return u


@jit
def _butterflies(y, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr):
    """Unnormalized H of size 2**STAGES on every 2**STAGES channels of [ROWS, BLOCK_K]."""
    for stage in tl.static_range(STAGES):
        pairs = tl.reshape(y, (ROWS, BLOCK_K // (2 << stage), 2, 1 << stage))
        second = (tl.arange(0, 2) == 1)[None, None, :, None]
        added = tl.sum(pairs, axis=2)[:, :, None, :]
        subtracted = tl.sum(tl.where(second, -pairs, pairs), axis=2)[:, :, None, :]
        y = tl.reshape(tl.where(second, subtracted, added), (ROWS, BLOCK_K))
    return y


@jit
def _load_matrix(ptr, size, BLOCK: tl.constexpr):
    """[BLOCK, BLOCK], zero beyond [size, size]."""
    i = tl.arange(0, BLOCK)
    mask = (i < size)[:, None] & (i < size)[None, :]
    return tl.load(ptr + i[:, None] * size + i[None, :], mask=mask, other=0.0)


@jit
def _two_products(
    u, left_ptr, right_ptr, f, p,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr, F: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """left^T u right for every [F, P] of u [ROWS, BLOCKS * F * P].

    The matrices hold -1, 0 and 1: with u in three parts tensor cores lose less than float32 does.
    Products in three dimensions stay on mma.sync, where a left operand in registers is safe.
    """
    N: tl.constexpr = ROWS * BLOCKS
    right = tl.broadcast_to(_load_matrix(right_ptr, p, P)[None, :, :], (N, P, P))
    left = tl.broadcast_to(tl.trans(_load_matrix(left_ptr, f, F))[None, :, :], (N, F, F))
    y = tl.dot(tl.reshape(u, (N, F, P)), right, input_precision="tf32x3")
    y = tl.dot(left, y, input_precision="tf32x3")
    return tl.reshape(y, (ROWS, BLOCKS * F * P))


@entry
def _hadamard_quantize_kernel(
    x_ptr, multiplier_ptr, offset_ptr, left_ptr, right_ptr, out_multiplier_ptr, out_offset_ptr,
    q_ptr, scale_ptr,
    M, K, G, f, p, width, stride_xm, clip, norm,
    STAGES: tl.constexpr, BLOCKS: tl.constexpr, F: tl.constexpr, P: tl.constexpr,
    GROUP: tl.constexpr, SPAN: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr,
    OFFSET: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(1) * BLOCK_K  # 0 where the products need a whole token
    offs_k, mask_k = lanes(start, K, GROUP, SPAN, BLOCK_K)
    u = _load_u(x_ptr, multiplier_ptr, offset_ptr, offs_m, offs_k, mask_k, M, stride_xm)
    if BLOCKS:
        y = _two_products(u, left_ptr, right_ptr, f, p, ROWS, BLOCKS, F, P)
        y = tl.where(mask_k[None, :], y, 0.0)
    else:
        y = _butterflies(u, ROWS, BLOCK_K, STAGES)
    y = y * norm
    if out_multiplier_ptr is not None:
        y = y * tl.load(out_multiplier_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)[None, :]
    if out_offset_ptr is not None:
        y = y + tl.load(out_offset_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)[None, :]
    if GROUP:
        limit = dynamic_limit(y, clip, ROWS, BLOCK_K, SPAN)
        first = tl.program_id(1) * (BLOCK_K // SPAN)
        store_scale(scale_ptr, limit, offs_m, M, G, first, BLOCK_K // SPAN, QMAX)
        y = dynamic_divide(y, limit, ROWS, BLOCK_K, SPAN, QMAX)
    store_codes(
        q_ptr, y, offs_m, start, M, width, QMIN, QMAX, OFFSET, ROWS, BLOCK_K, PACKED, GROUP, SPAN
    )


def hadamard_launch(M: int, K: int, block: int, codes: Codes) -> dict | None:
    """The compile-time parameters of the kernel, or None where PyTorch rotates.

    That is where channels would have to move: a group has another size than a power of two, or a
    factor of the rotation that is padded to one leaves holes between channels; and where registers
    do not hold the row or the matrices.
    """
    _, f, p = split(block)
    order, group = f * p, codes.group_size(K)
    blocks = K // order
    if not codes.static and group < K and group & (group - 1):
        return None
    if order & (order - 1) == 0:
        # a token with one scale is held whole; every other tile ends between two rotations
        whole = not codes.static and group >= K
        if whole and K > 2 * MAX_ROW:  # more than registers hold
            return None
        tile = codes.launch_one_part(M, K, max(order, next_power_of_2(K) if whole else 1))
        return {"STAGES": order.bit_length() - 1, "BLOCKS": 0, "F": 1, "P": 1, **tile}
    F, P = max(16, next_power_of_2(f)), max(16, next_power_of_2(p))  # as tl.dot wants them
    if (p != P and f * blocks > 1) or (f != F and blocks > 1):
        return None
    if F * P > 1024:  # more than registers hold
        return None
    BLOCKS = next_power_of_2(blocks)
    tile = codes.launch_one_part(M, K, BLOCKS * F * P)
    warps = min(max(tile["ROWS"] * BLOCKS * F * P // 2048, 2), 16)
    return {"STAGES": 0, "BLOCKS": BLOCKS, "F": F, "P": P, **tile, "num_warps": warps}


@planned
def _plan(
    shape: torch.Size, stride: tuple[int, ...], block: int,
    vectors: tuple[torch.Size | None, ...], codes: Codes,
) -> Plan | None:  # fmt: skip
    """None where PyTorch rotates."""
    _check(shape, block, *vectors)
    K, M = shape[-1], prod(shape[:-1])
    step, results = row_step(shape, stride), codes.results(shape)
    _, f, p = split(block)
    tile = hadamard_launch(M, K, block, codes)
    if tile is None:
        return None
    G = 1 if codes.static else results[1][0][-1]
    return Plan(
        copy=step is None,
        results=results,
        grid=(cdiv(M, tile["ROWS"]), cdiv(K, channels_of(tile))),
        numbers=(M, K, G, f, p, results[0][0][-1], K if step is None else step, codes.clip,
                 (f * p) ** -0.5),
        options={**tile, "enable_fp_fusion": False},  # as the reference: a product, then a sum
    )  # fmt: skip


def _empty(
    x: Tensor, _m: Any, _o: Any, codes: Codes, _block: int, _om: Any, _oo: Any
) -> list[Tensor]:
    return codes.empty(x)


@opaque(_empty)
def _launch_hadamard_quantize(
    x: Tensor, multiplier: Tensor | None, offset: Tensor | None, codes: Codes, block: int,
    out_multiplier: Tensor | None, out_offset: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    vectors = multiplier, offset, out_multiplier, out_offset
    plan = _plan(x.shape, x.stride(), block, tuple(map(shape_of, vectors)), codes)
    here = on_device(x, *vectors)
    if plan is None:  # the rotation by PyTorch, and all that follows in one pass
        u = x.float() if multiplier is None else x.float() * multiplier.float()
        y = hadamard(u if offset is None else u + offset.float(), block)
        return launch_shift_scale_quantize(y, out_multiplier, out_offset, codes, None)
    results = plan.empty(x.device)
    matrices: tuple[Tensor | None, ...] = (None, None)
    if plan.options["BLOCKS"]:
        matrices = tuple(signs_on(n, x.device) for n in plan.numbers[3:5])
    m, o, om, oo = (None if v is None else v.contiguous() for v in vectors)
    with here:
        _hadamard_quantize_kernel[plan.grid](
            x.contiguous() if plan.copy else x, m, o, *matrices, om, oo,
            results[0], None if len(results) == 1 else results[1], *plan.numbers, **plan.options,
        )  # fmt: skip
    return results


def hadamard_quantize(
    x: Tensor,
    multiplier: Tensor | None,
    offset: Tensor | None,
    codes: Codes,
    *,
    block: int | None = None,
    out_multiplier: Tensor | None = None,
    out_offset: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Quantizes the rotated x * multiplier + offset.

    Args:
        x: [..., K], float32, float16 or bfloat16.
        multiplier, out_multiplier: [K], or None for 1, before and after the rotation.
        offset, out_offset: [K], or None for 0, before and after the rotation.
        codes: what to write.
        block: channels that are rotated together, a divisor of K; K if None.

    Returns:
        q: [..., K], int8 or uint8, or [..., ceil(K / 128) * 64], uint8, if packed.
        scale: None (static), or [..., 1] or [..., G], float32; nan where a token or group holds
            nan. A static grid has no scale to say so, and its code of a nan is any.

    Raises:
        ValueError: a block that does not divide K, or a vector that is not [K].
    """
    name = backend_of(x, backend)
    block = x.shape[-1] if block is None else block
    if name == "triton" and x.numel():
        q, *scale = _launch_hadamard_quantize(
            x, multiplier, offset, codes, block, out_multiplier, out_offset
        )
        return q, scale[0] if scale else None
    _check(x.shape, block, *map(shape_of, (multiplier, offset, out_multiplier, out_offset)))
    return hadamard_quantize_ref(x, multiplier, offset, block, out_multiplier, out_offset, codes)
