"""The int4 layout that every kernel reads: half-split blocks of 128 channels.

    byte[64 b + j] = (k[128 b + j] & 15)  |  (k[128 b + 64 + j] & 15) << 4        0 <= j < 64

Two's-complement nibbles. A kernel that loads 64 consecutive bytes holds 64 consecutive channels
in the low nibbles and the next 64 in the high ones: two dot products and no interleaving.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128  # channels in one block
HALF = BLOCK // 2  # bytes in one block


def packed_width(K: int) -> int:
    """Bytes in a packed row of K channels."""
    return -(-K // BLOCK) * HALF


def pack_int4(q: Tensor) -> Tensor:
    """Packs two codes a byte, K padded with zeros to a multiple of 128.

    Args:
        q: [..., K], int8, in [-8, 7].

    Returns:
        packed: [..., ceil(K / 128) * 64], uint8.
    """
    if q.dtype != torch.int8:
        raise ValueError(f"pack_int4 needs int8 codes, got {q.dtype}")
    K = q.shape[-1]
    blocks = F.pad(q, (0, -K % BLOCK)).view(torch.uint8)
    low, high = blocks.unflatten(-1, (-1, 2, HALF)).unbind(-2)  # [..., ceil(K / 128), 64]
    return (low & 15 | high << 4).flatten(-2)


def unpack_int4(packed: Tensor, K: int) -> Tensor:
    """Inverts `pack_int4`.

    Args:
        packed: [..., ceil(K / 128) * 64], uint8.
        K: channels, without the padding.

    Returns:
        q: [..., K], int8.
    """
    if packed.dtype != torch.uint8 or packed.shape[-1] != packed_width(K):
        raise ValueError(
            f"{K} channels need uint8 [..., {packed_width(K)}], "
            f"got {packed.dtype} {list(packed.shape)}"
        )
    blocks = packed.unflatten(-1, (-1, HALF)).view(torch.int8)
    low, high = (blocks << 4) >> 4, blocks >> 4  # an arithmetic shift extends the sign
    return torch.stack((low, high), -2).flatten(-3)[..., :K]
