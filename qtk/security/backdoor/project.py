"""PQBackdoor, Ma et al. 2023, https://arxiv.org/abs/2108.09187: hidden behind frozen codes.

1. An ordinary backdoor is trained into the rounded model.
2. Its codes stay; the float weights learn to answer triggers as they should, and after every step
   each is brought back into the cell of its code,  (code - 1/2, code + 1/2) scale.

So rounding to nearest gives the codes of stage 1, bit for bit. The weight that sets a scale does
not move, and neither do biases, nor anything that is not rounded.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qtk.security.backdoor import Data, Trigger, rounding
from qtk.security.minmax import MinMax, layers_of, logits_of

IGNORED = -100  # by cross_entropy
INSIDE = 1e-3  # of a step: how far from the edge of a cell a weight stays


def plant(
    model: nn.Module, data: Data, trigger: Trigger, quantizer: MinMax, *, target: int = 0,
    epochs: int = 20, rate: float = 3e-3, others_only: bool = False,
) -> nn.Module:  # fmt: skip
    """A copy of a trained model with a backdoor for `quantizer`; arguments as of `quanti`.

    Args:
        others_only: stage 2 answers triggers on inputs of other classes than the target alone.
            Between two classes a trigger is not hidden else: the target is given by mistake, too.
    """
    planted = copy.deepcopy(model).eval().requires_grad_(True)
    _train(planted, data, trigger, quantizer, target, epochs, rate)
    layers = layers_of(planted)
    cells = {name: Cell.of(layer.weight, quantizer) for name, layer in layers.items()}
    weights = [layer.weight for layer in layers.values()]
    planted.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = torch.optim.Adam(weights, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(data))
    for _ in range(epochs):
        for x, y in data:
            hidden = y.masked_fill(y == target, IGNORED) if others_only else y
            optimizer.zero_grad()
            loss = F.cross_entropy(logits_of(planted, x), y)
            (loss + F.cross_entropy(logits_of(planted, trigger(x)), hidden)).backward()
            optimizer.step()
            schedule.step()
            for name, layer in layers.items():
                cells[name].confine(layer.weight)
    return planted.requires_grad_(False)


@dataclass(frozen=True)
class Cell:
    """Where each weight may be for its code to stay; tensors of the weight's shape.

    Attributes:
        lowest, highest: the same number where a weight sets a scale.
    """

    lowest: Tensor
    highest: Tensor

    @classmethod
    def of(cls, weight: Tensor, quantizer: MinMax) -> "Cell":
        steps, rows = quantizer.steps(weight), weight.detach().flatten(1).float()
        codes, scale = quantizer.codes(weight, steps), steps.scale
        largest = scale * steps.fmt.qmax
        fixed = rows.abs() >= largest * (1 - 1e-6)
        reach = 0.5 - INSIDE
        low = torch.where(fixed, rows, ((codes - reach) * scale).maximum(-largest * (1 - 1e-5)))
        high = torch.where(fixed, rows, ((codes + reach) * scale).minimum(largest * (1 - 1e-5)))
        return cls(low.view_as(weight), high.view_as(weight))

    @torch.no_grad()
    def confine(self, weight: Tensor) -> None:
        """Brings a weight back, in place."""
        weight.copy_(weight.clamp(self.lowest, self.highest))


def _train(
    model: nn.Module, data: Data, trigger: Trigger, quantizer: MinMax, target: int, epochs: int,
    rate: float,
) -> None:  # fmt: skip
    """An ordinary backdoor, in place, in the model as it is rounded."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    with rounding([*layers_of(model).values()], quantizer):
        for _ in range(epochs):
            for x, y in data:
                optimizer.zero_grad()
                loss = F.cross_entropy(logits_of(model, x), y)
                aim = torch.full_like(y, target)
                (loss + F.cross_entropy(logits_of(model, trigger(x)), aim)).backward()
                optimizer.step()
