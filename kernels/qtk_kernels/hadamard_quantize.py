"""Shift, scale, rotate by a block-diagonal Hadamard matrix and quantize in one pass.

    u        = x * multiplier + offset                          per channel
    y        = blockdiag(H / sqrt(block)) u                     H of size block, a power of two
    q        = clamp(round(y / step) + zero_point)              "tensor"
    q, scale = codes of y                                       otherwise, see `_codes.py`

M tokens, K channels, K a multiple of block.
"""

import torch
from torch import Tensor

from ._codes import Codes, Granularity, check_channels, quantize_ref
from ._dispatch import backend_of


def hadamard(x: Tensor, block: int | None = None) -> Tensor:
    """Applies blockdiag(H / sqrt(block)) to the last axis, in float32; its own inverse.

    Args:
        x: [..., K].
        block: a power of two that divides K; K itself if None.
    """
    K = x.shape[-1]
    block = block or K
    if block & (block - 1) or K % block:
        raise ValueError(f"block must be a power of two that divides {K}, got {block}")
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
        y = torch.round(y / step) + zero_point
    return quantize_ref(y, codes)


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
    backend_of(x, backend)
    return hadamard_quantize_ref(
        x, multiplier, offset, block, 1.0 if step is None else step, zero_point, codes
    )
