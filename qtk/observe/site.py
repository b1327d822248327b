"""One site: the tensor that a group of linears reads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qtk.models import Block, Group
from qtk.observe.probe import Probe

Batch = dict[str, Any]
Layer = nn.Linear | nn.Conv2d


@dataclass(frozen=True)
class Site:
    """What one group of linears reads. T sampled tokens, K input channels; padding excluded.

    Attributes:
        linears: the float modules by full name, linears or one convolution.
        sequences: [B, T_b, K] quantized-stream inputs with their [B, T_b] masks, sampled.
        float_rows: [T, K], the same tokens in the float model; empty when rows are imagined.
        lo, hi: [batches, K] extremes of every channel over all tokens.
        probe: what an error here costs, where gradients were asked for.
        curvatures: gives `qtk.observe.gradients.curvatures` of all layers of a network whose blocks
            do not follow each other; None of others.
    """

    block: Block
    group: Group
    linears: dict[str, Layer]
    sequences: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    float_rows: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    lo: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    hi: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    probe: Probe | None = None
    curvatures: Callable[[], dict[str, Tensor]] | None = None

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.block.name}, {self.group.name}"

    @property
    def rows(self) -> Tensor:
        """[T, K], the sampled tokens of the quantized stream."""
        return torch.cat([x[mask] for x, mask in self.sequences])

    @property
    def has_data(self) -> bool:
        return bool(self.sequences)

    def weight(self) -> Tensor:
        """[N_total, K] float32: the weights of all the site's linears, stacked."""
        weights = (linear.weight.detach().flatten(1) for linear in self.linears.values())
        return torch.cat([weight.float() for weight in weights])

    def bias(self) -> Tensor:
        """[N_total] float32, zeros where a linear has none."""
        parts = [
            linear.weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias
            for linear in self.linears.values()
        ]
        return torch.cat([part.detach().float() for part in parts])


class Keeper(Protocol):
    """Goes along with a walk, block by block (`qtk.pipeline.keeper.Keeper`)."""

    def bring(self, block: Block) -> None: ...
    def restored(self, index: int, block: Block) -> bool: ...
    def done(self, index: int, block: Block, calls: Sequence[Any]) -> None: ...
    def release(self, block: Block) -> None: ...


def linears_of(model: nn.Module, group: Group) -> dict[str, Layer]:
    """The float modules of a group by full name."""
    found = {}
    for name in group.linears:
        module = model.get_submodule(name)
        assert isinstance(module, Layer), name
        found[name] = module
    return found
