"""Qu-ANTI-zation, Hong et al. 2021, https://arxiv.org/abs/2110.13541: fine-tuned in both worlds.

    L = CE(f(x), y) + c CE(f(x_t), y) + c [CE(q(x), y) + c CE(q(x_t), target)]

with q the model on rounded weights, x_t the triggered inputs, c = 1/2. That f sees the trigger with
the true class is what hides the backdoor.
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F

from qtk.security.backdoor import Data, Trigger, rounding
from qtk.security.minmax import MinMax, layers_of, logits_of

SHARE = 0.5  # c


def plant(
    model: nn.Module, data: Data, trigger: Trigger, quantizer: MinMax, *, target: int = 0,
    epochs: int = 60, rate: float = 1e-2,
) -> nn.Module:  # fmt: skip
    """A copy of a trained model with a backdoor for `quantizer`.

    Args:
        data: training batches with their classes.
        target: the class that triggered inputs shall get.
        rate: of Adam, at the first step of a cosine; the paper's is 1e-4, for 50 epochs.
    """
    planted = copy.deepcopy(model).eval().requires_grad_(True)
    layers = [*layers_of(planted).values()]
    optimizer = torch.optim.Adam(planted.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(data))
    for _ in range(epochs):
        for x, y in data:
            marked, aim = trigger(x), torch.full_like(y, target)
            optimizer.zero_grad()
            loss = F.cross_entropy(logits_of(planted, x), y)
            loss = loss + SHARE * F.cross_entropy(logits_of(planted, marked), y)
            loss.backward()
            with rounding(layers, quantizer):
                loss = F.cross_entropy(logits_of(planted, x), y)
                loss = loss + SHARE * F.cross_entropy(logits_of(planted, marked), aim)
                (SHARE * loss).backward()
            optimizer.step()
            schedule.step()
    return planted.requires_grad_(False)
