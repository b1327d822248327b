"""KnockoffNets (Orekondy et al., CVPR 2019, https://arxiv.org/abs/1812.02766), random strategy."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def queries(
    answer: Callable[[Tensor], Tensor], pool: Tensor, budget: int, generator: torch.Generator,
    learn: Callable[[Tensor, Tensor], nn.Module],
) -> Tensor:  # fmt: skip
    """Images of the pool, each once, drawn without order."""
    return pool[torch.randperm(len(pool), generator=generator)[:budget]]
