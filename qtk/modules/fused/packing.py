"""Padding is left out: a block computes on the tokens of a batch that anybody attends to.

All parts of a block but attention treat each token alone, so they run on the N tokens that count,
[1, N, H], whatever their sentences. Attention sees them in their places, with zeros between, or, on
a GPU, one sentence after another. The numbers of those tokens are the same to the bit, because no
row of a product depends on another; the rest leave the block as zeros. FlashAttention's unpadding
does the same to float models.
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
        sequences: [B, 3] int32, of each sentence its first row and the places of its tokens, first
            and past the last; None where the mask says more than that, or nobody asked.
        causal: tokens do not see later ones.
    """

    batch: int
    tokens: int
    rows: Tensor | None = None
    sequences: Tensor | None = None
    causal: bool = False

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, H] -> [1, N, H]."""
        return x if self.rows is None else x.flatten(0, 1)[self.rows][None]

    def unpack(self, x: Tensor) -> Tensor:
        """[1, N, H] -> [B, T, H], zeros for tokens that nobody sees."""
        if self.rows is None:
            return x
        whole = x.new_zeros(self.batch * self.tokens, x.shape[-1])
        return whole.index_copy_(0, self.rows, x[0]).view(self.batch, self.tokens, -1)


# by mask: a model gives all blocks the same
_found: WeakIdKeyDictionary = WeakIdKeyDictionary()


def packing_of(x: Tensor, mask: Tensor | None, sequences: bool = False) -> Packing:
    """How a batch is packed, or not.

    Args:
        x: [B, T, H].
        mask: bool, or float that is added, broadcast against [B, heads, T, Tk]; tokens that it
            hides from every query are padding. A batch is left alone where all its tokens count
            or nearly so, where keys of earlier calls are in the mask, and in traced code, whose
            shapes must not depend on numbers.
        sequences: attention can read one sentence after another.
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
        return _packed(mask, tokens, sequences)
    known, packing = _found.get(mask, (None, whole))
    if known != (mask._version, tokens, sequences):
        packing = _packed(mask, tokens, sequences)
        _found[mask] = (mask._version, tokens, sequences), packing
    return packing


def _packed(mask: Tensor, tokens: int, sequences: bool) -> Packing:
    """By the tokens that some query sees; all of them where it is not worth it."""
    batch = mask.shape[0]
    visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    seen = visible.any(dim=(1, 2))  # [B, T]
    rows = seen.flatten().nonzero()[:, 0]
    if not 0 < rows.numel() <= WORTH * batch * tokens:
        return Packing(batch, tokens)
    if not sequences:
        return Packing(batch, tokens, rows)
    return Packing(batch, tokens, rows, *_sequences(mask, visible, seen))


def _sequences(mask: Tensor, visible: Tensor, seen: Tensor) -> tuple[Tensor | None, bool]:
    """The sentences of a mask that hides padding and, where it does, later tokens; else None."""
    place = torch.arange(seen.shape[1], device=seen.device)
    count = seen.sum(1)
    first = seen.int().argmax(1)
    end = first + count
    keys = (place >= first[:, None]) & (place < end[:, None])  # [B, T]
    of_keys = keys[:, None, None]  # [B, 1, 1, T]
    padding = ~seen[:, None, :, None]  # queries that nobody asks about
    below = of_keys & (place[:, None] >= place)
    alike = [((visible == wanted) | padding).all() for wanted in (of_keys, below)]
    biased = mask.dtype != torch.bool and (mask.masked_fill(~visible, 0) != 0).any()
    plain, causal, no_holes, added = torch.stack(
        [*alike, (keys == seen).all(), torch.as_tensor(biased, device=mask.device)]
    ).tolist()
    if added or not no_holes or not (plain or causal):
        return None, False
    starts = torch.stack([count.cumsum(0) - count, first, end], 1)
    return starts.int(), bool(causal and not plain)
