"""Sites without any data, from what the LayerNorms know."""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from qtk.models import Block
from qtk.observe.site import Site, linears_of


def imagine(
    model: nn.Module, blocks: Sequence[Block], seed: int = 0, tokens: int = 512
) -> Iterator[Site]:
    """The same sites without any data.

    A LayerNorm's output channel j is centred on beta_j with spread |gamma_j|, so rows are drawn
    from that; a site that reads no LayerNorm gets no rows.
    """
    generator = torch.Generator().manual_seed(seed)
    for block in blocks:
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
