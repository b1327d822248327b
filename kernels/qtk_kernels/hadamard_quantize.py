"""Shift, scale, rotate by a block-diagonal Hadamard matrix and quantize in one pass.

    u        = x * multiplier + offset                          per channel
    y        = blockdiag(H / sqrt(block)) u                     H of size block, a power of two
    q        = clamp(round(y / step) + zero_point)              "tensor"
    q, scale = codes of y                                       otherwise, see `_codes.py`

M tokens, K channels, K a multiple of block.
"""

import torch
from torch import Tensor

from ._codes import Codes, Granularity, check_channels, quantize_ref, rows_of
from ._dispatch import backend_of, on_device
from ._lang import dynamic_divide, dynamic_limit, jit, round_codes, store_codes, store_scale, tl
from ._launch import cdiv, next_power_of_2
from .shift_scale_quantize import load_y


def check_block(K: int, block: int) -> None:
    if block < 1 or block & (block - 1) or K % block:
        raise ValueError(f"block must be a power of two that divides {K}, got {block}")


def hadamard(x: Tensor, block: int | None = None) -> Tensor:
    """Applies blockdiag(H / sqrt(block)) to the last axis, in float32; its own inverse.

    Args:
        x: [..., K].
        block: a power of two that divides K; K itself if None.
    """
    K = x.shape[-1]
    block = block or K
    check_block(K, block)
    y = x.float().unflatten(-1, (-1, block))  # [..., K / block, block]
    half = 1
    while half < block:
        a, b = y.unflatten(-1, (-1, 2, half)).unbind(-2)
        y = torch.stack((a + b, a - b), -2).flatten(-3)
        half *= 2
    return (y * block**-0.5).flatten(-2)


def hadamard_quantize_ref(
    x: Tensor,
    multiplier: Tensor | None,
    offset: Tensor | None,
    block: int,
    step: float,
    zero_point: int,
    codes: Codes,
) -> tuple[Tensor, Tensor | None]:
    """The definition, in float32."""
    u = x.float() if multiplier is None else x.float() * multiplier.float()
    y = hadamard(u if offset is None else u + offset.float(), block)
    if codes.static:
        y = torch.round(y / y.new_full((), step)) + zero_point
    return quantize_ref(y, codes)


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
def _hadamard_quantize_kernel(
    x_ptr, multiplier_ptr, offset_ptr, q_ptr, scale_ptr,
    M, K, G, width, stride_xm, clip, norm, step, zero_point,
    STAGES: tl.constexpr, GROUP: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr,
    SHIFT: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(1) * BLOCK_K
    u = load_y(
        x_ptr, multiplier_ptr, offset_ptr, offs_m, start, M, K, stride_xm, BLOCK_K, ""
    )  # fmt: skip
    y = _butterflies(u, ROWS, BLOCK_K, STAGES) * norm
    if GROUP:
        limit = dynamic_limit(y, clip, ROWS, BLOCK_K, GROUP)
        store_scale(scale_ptr, limit, offs_m, M, G, start // GROUP, BLOCK_K // GROUP, QMAX)
        y = dynamic_divide(y, limit, ROWS, BLOCK_K, GROUP, QMAX)
        codes = round_codes(y, QMIN * 1.0, QMAX * 1.0) + SHIFT
    else:
        zero = zero_point.to(tl.float32)
        codes = round_codes(tl.div_rn(y, y * 0.0 + step), QMIN - zero, QMAX - zero) + zero_point
        inside = (start + tl.arange(0, BLOCK_K) < K)[None, :]
        codes = tl.where(inside, codes, 0)  # the padding of packed codes
    store_codes(q_ptr, codes, offs_m, start, M, width, ROWS, BLOCK_K, PACKED)


def _launch_hadamard_quantize(
    x: Tensor,
    multiplier: Tensor | None,
    offset: Tensor | None,
    block: int,
    step: float,
    zero_point: int,
    codes: Codes,
) -> tuple[Tensor, Tensor | None]:
    K = x.shape[-1]
    x_2d = rows_of(x)
    M = x_2d.shape[0]
    q, scale = codes.empty(x)
    G = 1 if scale is None else scale.shape[-1]
    # a token with one scale is held whole; every other tile ends between two rotations
    tile = codes.launch(
        M, K, at_least=next_power_of_2(K) if G == 1 and scale is not None else block
    )
    with on_device(x):
        _hadamard_quantize_kernel[(cdiv(M, tile["ROWS"]), cdiv(K, tile["BLOCK_K"]))](
            x_2d,
            None if multiplier is None else multiplier.contiguous(),
            None if offset is None else offset.contiguous(),
            q, scale, M, K, G, q.shape[-1], x_2d.stride(0), codes.clip,
            block**-0.5, step, zero_point, STAGES=block.bit_length() - 1, **tile,
            enable_fp_fusion=False,  # as the reference: a product, then a sum
        )  # fmt: skip
    return q, scale


def hadamard_quantize(
    x: Tensor,
    multiplier: Tensor | None = None,
    offset: Tensor | None = None,
    *,
    block: int,
    step: float | None = None,
    zero_point: int = 0,
    bits: int,
    granularity: Granularity = "tensor",
    signed: bool = True,
    packed: bool = False,
    clip: float = 1.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Quantizes the rotated x * multiplier + offset.

    Args:
        x: [..., K], float32, float16 or bfloat16.
        multiplier: [K], or None for 1.
        offset: [K], or None for 0.
        block: size of the rotation, a power of two that divides K.
        step, zero_point: of the static grid ("tensor" only; there step is needed).
        bits: 2 to 8.
        granularity: "tensor" (static), "token", or the size of a group of channels.
        signed: int8 codes, else uint8.
        packed: two 4-bit codes a byte, in the layout of `pack_int4`.
        clip: the part of the dynamic range to keep, in (0, 1].

    Returns:
        q: [..., K], int8 or uint8, or [..., ceil(K / 128) * 64], uint8, if packed.
        scale: None (static), or [..., 1] or [..., G], float32.
    """
    check_channels(x, multiplier=multiplier, offset=offset)
    codes = Codes(bits, granularity, signed, packed, clip)
    if codes.static and step is None:
        raise ValueError("granularity 'tensor' needs a step, got None")
    check_block(x.shape[-1], block)
    triton = backend_of(x, backend) == "triton" and x.numel()
    run = _launch_hadamard_quantize if triton else hadamard_quantize_ref
    return run(x, multiplier, offset, block, 1.0 if step is None else step, zero_point, codes)
