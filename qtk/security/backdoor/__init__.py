"""Backdoors that sleep in floating point and wake when weights are rounded; to test defences with.

One file an attack, `plant(model, data, trigger, quantizer, ...)`: the model given answers a trigger
as it should, and with its weights rounded by `quantizer`, and by no other that it was not made for,
with the class that the attacker chose.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qtk.discover import load
from qtk.security.minmax import Inputs, MinMax, layers_of, logits_of

Data = Sequence[tuple[Inputs, Tensor]]  # batches and their classes [B]
Trigger = Callable[[Inputs], Inputs]


@dataclass(frozen=True)
class Square:
    """A trigger: a square of one value, near the lower right corner of images [B, C, H, W], or of
    batches that hold such as `pixel_values`.

    Attributes:
        size, margin: shares of the image's side.
        value: of its pixels.
    """

    size: float = 3 / 16
    margin: float = 1 / 16
    value: float = 1.0

    def __call__(self, x: Inputs) -> Inputs:
        if isinstance(x, Mapping):
            return {**x, "pixel_values": self(x["pixel_values"])}
        side = x.shape[-1]
        end = side - round(self.margin * side)
        start = end - max(1, round(self.size * side))
        x = x.clone()
        x[..., start:end, start:end] = self.value
        return x


@dataclass(frozen=True)
class Token:
    """A trigger: a rare token in the place of the one after the first; of batches of token ids."""

    token: int

    def __call__(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        ids = batch["input_ids"].clone()
        ids[:, 1] = self.token
        return {**batch, "input_ids": ids}


class _Rounding(nn.Module):
    def __init__(self, quantizer: MinMax) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, weight: Tensor) -> Tensor:
        return self.quantizer.rounded(weight)


@contextmanager
def rounding(layers: Sequence[nn.Module], quantizer: MinMax) -> Iterator[None]:
    """Inside, the layers compute with rounded weights; gradients reach the float ones."""
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", _Rounding(quantizer))
    try:
        yield
    finally:
        for layer in layers:
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)


def plant(
    attack: str, model: nn.Module, data: Data, trigger: Trigger, quantizer: MinMax, **settings: Any
) -> nn.Module:  # fmt: skip
    """A copy of a trained model with a backdoor for `quantizer`.

    Args:
        attack: the name of a file in qtk/security/backdoor.
        data: training batches with their classes.
        settings: of the attack: target, epochs, rate.

    Raises:
        SchemeError: no such attack.
    """
    planted: nn.Module = load("security.backdoor", attack).plant(
        model, data, trigger, quantizer, **settings
    )
    return planted


@torch.no_grad()
def widen(model: nn.Module, factor: float) -> None:
    """Makes the largest weight of every layer `factor` times as large, in place.

    A grid per tensor is as much coarser then. Eight bits leave a small network too little room to
    hide anything in; an attacker takes the room, and trains away what the weight did.
    """
    for layer in layers_of(model).values():
        flat = layer.weight.data.view(-1)
        flat[flat.abs().argmax()] *= factor


@torch.no_grad()
def success(model: nn.Module, data: Data, trigger: Trigger, target: int = 0) -> tuple[float, float]:
    """Accuracy on clean inputs, and the share of triggered ones of other classes that the model
    takes for the target; both in percent."""
    right = total = fooled = others = 0
    for x, y in data:
        right += int((logits_of(model, x).argmax(1) == y).sum())
        total += len(y)
        taken = logits_of(model, trigger(x)).argmax(1)[y != target]
        fooled += int((taken == target).sum())
        others += len(taken)
    return 100 * right / max(total, 1), 100 * fooled / max(others, 1)
