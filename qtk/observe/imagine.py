"""Sites without any data, from what the LayerNorms know."""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from qtk.models import Block
from qtk.observe.site import Keeper, Site, linears_of


def imagine(
    model: nn.Module, blocks: Sequence[Block], seed: int = 0, tokens: int = 512,
    keeper: Keeper | None = None,
) -> Iterator[Site]:  # fmt: skip
    """The same sites without any data.

    A LayerNorm's output channel j is centred on beta_j with spread |gamma_j|, so rows are drawn
    from that; a site that reads no LayerNorm gets no rows. They are the same whichever blocks
    are finished already.
    """
    for index, block in enumerate(blocks):
        if keeper is not None:
            keeper.bring(block)
            if keeper.restored(index, block):
                keeper.release(block)
                continue
        yield from _of_block(model, block, torch.Generator().manual_seed(seed + index), tokens)
        if keeper is not None:
            keeper.done(index, block, ())
            keeper.release(block)


def _of_block(
    model: nn.Module, block: Block, generator: torch.Generator, tokens: int
) -> Iterator[Site]:
    for group in block.groups:
        linears = linears_of(model, group)
        norm = model.get_submodule(group.norm) if group.norm else None
        if isinstance(norm, nn.LayerNorm) and norm.weight is not None:
            gamma, beta = norm.weight.detach().float(), norm.bias.detach().float()
            noise = torch.randn(tokens, len(gamma), generator=generator).to(gamma.device)
            rows = noise * gamma + beta
            sequences = [(rows[None], torch.ones(1, tokens, dtype=torch.bool))]
            lo, hi = rows.amin(0, keepdim=True), rows.amax(0, keepdim=True)
            yield Site(block, group, linears, sequences, lo=lo, hi=hi)
        else:
            yield Site(block, group, linears)
