"""Codes as they are stored: int8, packed int4, or dense bits for the widths without a kernel.

Dense bits: codes of b bits lie side by side, little end first, b/8 bytes each. Rows start on a
byte.
"""

import torch
from torch import Tensor

from qtk_kernels.packing import pack_int4, unpack_int4


def stored_shape(K: int, bits: int) -> tuple[torch.dtype, tuple[int, int]]:
    """dtype and shape of one row of `store`'s result."""
    if bits == 8:
        return torch.int8, (K, 1)
    return torch.uint8, (-(-K // 128) * 64 if bits == 4 else -(-K * bits // 8), 1)


def store(codes: Tensor, bits: int) -> Tensor:
    """[N, K] int8 codes -> as they go to disk, [N, width, 1].

    The last axis tells codes from floats: a loader that does not know qtk fails on the shape
    instead of reading codes as weights.
    """
    if bits == 8:
        return codes[..., None]
    return (pack_int4(codes) if bits == 4 else pack_dense(codes, bits))[..., None]


def load(stored: Tensor, bits: int, K: int) -> Tensor:
    """Inverse of `store`."""
    rows = stored[..., 0]
    if bits == 8:
        return rows
    return unpack_int4(rows, K) if bits == 4 else unpack_dense(rows, bits, K)


def pack_dense(q: Tensor, bits: int) -> Tensor:
    """[N, K] int8 codes in two's complement -> [N, ceil(K * bits / 8)] uint8."""
    N, K = q.shape
    shifts = torch.arange(bits, device=q.device)
    ones = (q.to(torch.int16)[..., None] >> shifts) & 1  # [N, K, bits]
    stream = ones.view(N, K * bits)
    stream = torch.nn.functional.pad(stream, (0, -(K * bits) % 8)).view(N, -1, 8)
    place = 1 << torch.arange(8, device=q.device, dtype=torch.int16)
    return (stream * place).sum(-1).to(torch.uint8)


def unpack_dense(packed: Tensor, bits: int, K: int) -> Tensor:
    """Inverse of `pack_dense`: [N, ceil(K * bits / 8)] uint8 -> [N, K] int8."""
    N = packed.shape[0]
    stream = (packed[..., None] >> torch.arange(8, device=packed.device, dtype=torch.uint8)) & 1
    ones = stream.view(N, -1)[:, : K * bits].view(N, K, bits).to(torch.int16)
    place = 1 << torch.arange(bits, device=packed.device, dtype=torch.int16)
    unsigned = (ones * place).sum(-1)
    return (unsigned - ((unsigned >> (bits - 1)) << bits)).to(torch.int8)
