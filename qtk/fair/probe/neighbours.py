"""Rows of the data in which one feature is another: near what occurs, but not in it."""

import torch
from torch import Tensor

from qtk.fair.answer import Answer
from qtk.fair.domain import Attribute, Domain


def draw(
    answer: Answer, rows: Tensor, domain: Domain, protected: Attribute, n: int,
    generator: torch.Generator,
) -> Tensor:  # fmt: skip
    """n rows drawn, one position of each changed to another valid id: [M, T], M <= n.

    Positions that have one valid id, and the protected one, stay as they are.
    """
    free = [p for p, size in enumerate(domain.sizes) if size > 1 and p != protected.position]
    found = rows[torch.randint(len(rows), (n,), generator=generator)]
    if not free:
        return protected.unique(found)
    ordinals = domain.ordinals(found)
    position = torch.tensor(free)[torch.randint(len(free), (n,), generator=generator)]
    sizes = torch.tensor(domain.sizes)[position]
    step = 1 + (torch.rand(n, generator=generator) * (sizes - 1)).long().clamp(max=sizes - 2)
    each = torch.arange(n)
    ordinals[each, position] = (ordinals[each, position] + step) % sizes
    return protected.unique(domain.tokens(ordinals))
