"""Codes as they are stored: int8, packed int4, or dense bits for the widths without a kernel."""

import torch
from torch import Tensor

from qtk.pack import dense
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
    return (pack_int4(codes) if bits == 4 else dense.pack(codes, bits))[..., None]


def load(stored: Tensor, bits: int, K: int) -> Tensor:
    """Inverse of `store`."""
    rows = stored[..., 0]
    if bits == 8:
        return rows
    return unpack_int4(rows, K) if bits == 4 else dense.unpack(rows, bits, K)
