"""Plain rounding to nearest, and models that compute with weights so rounded."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qtk.grids import Steps
from qtk.round import Problem, Rounded
from qtk.scheme import Format

Inputs = Any  # a tensor, or a dict of tensors as a model of transformers reads them

LAYERS = (nn.Conv2d, nn.Linear)


@dataclass(frozen=True)
class MinMax:
    """Rounding to nearest on grids that reach the largest weight: what these attacks are made for.

    scale = max |w| / (2**(bits - 1) - 1), of each output channel or of the whole tensor. Given to
    `qtk.quantize` as `rounding` it is the quantizer that a model was planted for.

    Attributes:
        bits: of the weights.
        per: "channel" or "tensor".
    """

    bits: int
    per: str = "channel"

    @property
    def __name__(self) -> str:
        return f"minmax per {self.per}"

    def steps(self, weight: Tensor) -> Steps:
        """Of a weight [N, ...]."""
        fmt, rows = Format(self.bits), weight.detach().flatten(1).float()
        largest = rows.abs().amax(1, keepdim=True)
        if self.per == "tensor":
            largest = largest.amax().expand_as(largest)
        return Steps(fmt, largest.clamp(min=1e-12) / fmt.qmax)

    def codes(self, weight: Tensor, steps: Steps | None = None) -> Tensor:
        """[N, K] of a weight [N, ...]."""
        rows, steps = weight.detach().flatten(1).float(), steps or self.steps(weight)
        return steps.codes(steps.grid(rows.shape[1]).nearest(rows))

    def rounded(self, weight: Tensor) -> Tensor:
        """The weight on its grid; gradients pass as if it was not rounded."""
        steps = self.steps(weight)
        found = steps.dequantize(self.codes(weight, steps)).view_as(weight).to(weight.dtype)
        return weight + (found - weight).detach()

    def grids(self, problem: Problem) -> Steps:
        """The steps of a layer, for `flipped` and `adaround` to round on."""
        assert problem.fmt == Format(self.bits), "planted for weights of other bits"
        return self.steps(problem.weight)

    def find(self, problem: Problem) -> Rounded:
        """As a rounder of `qtk.quantize`."""
        steps = self.grids(problem)
        return Rounded(self.codes(problem.weight, steps), steps)


def rounded(model: nn.Module, how: MinMax | Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of a model with other weights: rounded to nearest, or by a function."""
    change = how if callable(how) else how.rounded
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for layer in layers_of(twin).values():
            layer.weight = nn.Parameter(change(layer.weight.detach()), False)
    return twin


def layers_of(model: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    """The convolutions and linears whose weights are rounded, by full name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LAYERS)}


def logits_of(model: nn.Module, x: Inputs) -> Tensor:
    """[B, classes]."""
    out = model(**x) if isinstance(x, Mapping) else model(x)
    return out if isinstance(out, Tensor) else out.logits
