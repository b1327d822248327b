"""Dense bits: codes of b bits lie side by side, little end first, b/8 bytes each.

Rows start on a byte. Used on disk for the widths that have no kernel of their own (2, 3, 5, 6, 7).
"""

import torch
from torch import Tensor


def pack(q: Tensor, bits: int) -> Tensor:
    """[N, K] int8 codes in two's complement -> [N, ceil(K * bits / 8)] uint8."""
    N, K = q.shape
    shifts = torch.arange(bits, device=q.device)
    ones = (q.to(torch.int16)[..., None] >> shifts) & 1  # [N, K, bits]
    stream = ones.view(N, K * bits)
    stream = torch.nn.functional.pad(stream, (0, -(K * bits) % 8)).view(N, -1, 8)
    place = 1 << torch.arange(8, device=q.device, dtype=torch.int16)
    return (stream * place).sum(-1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, K: int) -> Tensor:
    """Inverse of `pack`: [N, ceil(K * bits / 8)] uint8 -> [N, K] int8."""
    N = packed.shape[0]
    stream = (packed[..., None] >> torch.arange(8, device=packed.device, dtype=torch.uint8)) & 1
    ones = stream.view(N, -1)[:, : K * bits].view(N, K, bits).to(torch.int16)
    place = 1 << torch.arange(bits, device=packed.device, dtype=torch.int16)
    unsigned = (ones * place).sum(-1)
    return (unsigned - ((unsigned >> (bits - 1)) << bits)).to(torch.int8)
