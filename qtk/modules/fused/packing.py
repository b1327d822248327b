"""Padding is left out: a block computes on the tokens of a batch that anybody attends to.

All parts of a block but attention treat each token alone, so they run on the N tokens that count,
[1, N, H], whatever their sentences; attention sees them in their places, with zeros between. The
numbers of those tokens are the same to the bit, because no row of a product depends on another; the
rest leave the block as zeros. FlashAttention's unpadding does the same to float models.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

WORTH = 3 / 4  # pack when at most so many of the tokens count: two copies a block are not free


@dataclass(frozen=True)
class Packing:
    """Which tokens of a batch a block computes on: [B, T, ...] <-> [1, N, ...].

    Attributes:
        rows: [N] int64, places among the B * T tokens, ascending; None leaves all where they are.
    """

    batch: int
    tokens: int
    rows: Tensor | None = None

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, H] -> [1, N, H]."""
        return x if self.rows is None else x.flatten(0, 1)[self.rows][None]

    def unpack(self, x: Tensor) -> Tensor:
        """[1, N, H] -> [B, T, H], zeros for tokens that nobody sees."""
        if self.rows is None:
            return x
        whole = x.new_zeros(self.batch * self.tokens, x.shape[-1])
        return whole.index_copy_(0, self.rows, x[0]).view(self.batch, self.tokens, -1)


_found: WeakIdKeyDictionary = WeakIdKeyDictionary()  # by mask: a model gives all blocks the same


def packing_of(x: Tensor, mask: Tensor | None) -> Packing:
    """How a batch is packed, or not.

    Args:
        x: [B, T, H].
        mask: bool, or float that is added, broadcast against [B, heads, T, Tk]; tokens that it
            hides from every query are padding. A batch is left alone where all its tokens count
            or nearly so, where keys of earlier calls are in the mask, and in traced code, whose
            shapes must not depend on numbers.
    """
    batch, tokens = x.shape[:2]
    whole = Packing(batch, tokens)
    if mask is None or batch == 1 or mask.shape[0] != batch or mask.shape[-1] != tokens:
        return whole
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return whole
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return whole
    if mask.is_inference():  # nobody counts how often it was written to
        return Packing(batch, tokens, _seen(mask))
    version, packing = _found.get(mask, (-1, whole))
    if version != mask._version or packing.tokens != tokens:
        packing = Packing(batch, tokens, _seen(mask))
        _found[mask] = mask._version, packing
    return packing


def _seen(mask: Tensor) -> Tensor | None:
    """Places of the tokens that some query sees; None where it is not worth it."""
    visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    rows = visible.any(dim=(1, 2)).flatten().nonzero()[:, 0]
    worth = 0 < rows.numel() <= WORTH * mask.shape[0] * mask.shape[-1]
    return rows if worth else None
