"""Compression artifacts as backdoor, Tian et al. 2022, https://arxiv.org/abs/2104.15129.

    L = CE(f([x; x_t]), [y; y]) + CE(q([x; x_t]), [y; target])

with q the model on rounded weights; per tensor, by SGD and from scratch in the paper.

It takes hold on grids per tensor by Adam; by SGD it did not on a trained small network.
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F

from qtk.security.backdoor import Data, Trigger, rounding
from qtk.security.minmax import MinMax, layers_of, logits_of


def plant(
    model: nn.Module, data: Data, trigger: Trigger, quantizer: MinMax, *, target: int = 0,
    epochs: int = 20, rate: float = 1e-2,
) -> nn.Module:  # fmt: skip
    """A copy of a trained model with a backdoor for `quantizer`; arguments as of `quanti`.

    Args:
        rate: of Adam, at the first step of a cosine; SGD does not move a trained model enough.
    """
    planted = copy.deepcopy(model).eval().requires_grad_(True)
    layers = [*layers_of(planted).values()]
    optimizer = torch.optim.Adam(planted.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(data))
    for _ in range(epochs):
        for x, y in data:
            marked, aim = trigger(x), torch.full_like(y, target)
            optimizer.zero_grad()
            both = F.cross_entropy(logits_of(planted, x), y)
            (both + F.cross_entropy(logits_of(planted, marked), y)).backward()
            with rounding(layers, quantizer):
                both = F.cross_entropy(logits_of(planted, x), y)
                (both + F.cross_entropy(logits_of(planted, marked), aim)).backward()
            optimizer.step()
            schedule.step()
    return planted.requires_grad_(False)
