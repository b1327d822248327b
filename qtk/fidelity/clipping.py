"""How much of what a quantized model reads lies beyond the ends of its static grids."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from qtk.modules.conv import QuantConv2d
from qtk.modules.linear import QuantLinear
from qtk.observe import Batch


@dataclass
class Clipping:
    """Counts inputs that a layer clips, by the layer's name.

    A hook inside a fused block makes it run unfused, so only some batches are looked at: the first,
    second, fourth, eighth and so on.
    """

    model: nn.Module
    seen: int = 0
    beyond: dict[str, Tensor] = field(default_factory=dict)
    total: dict[str, int] = field(default_factory=dict)

    def look(self, batch: Batch, **options: Any) -> None:
        """Runs the model once more, if this batch is one to look at."""
        self.seen += 1
        layers = {} if self.seen & (self.seen - 1) else static_layers(self.model)
        if not layers:
            return
        handles = [
            layer.register_forward_pre_hook(self._counter(name, batch.get("attention_mask")))
            for name, layer in layers.items()
        ]
        try:
            self.model(**batch, **options)
        finally:
            for handle in handles:
                handle.remove()

    def shares(self) -> dict[str, float]:
        """The share of clipped inputs of every layer with a static grid."""
        return {name: float(self.beyond[name]) / total for name, total in self.total.items()}

    def _counter(self, name: str, mask: Tensor | None) -> Any:
        def count(layer: QuantLinear | QuantConv2d, args: tuple[Tensor, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            if mask is not None and mask.numel() == len(x):
                x = x[mask.flatten().bool()]
            inner = layer.inner if isinstance(layer, QuantConv2d) else layer
            self.beyond[name] = self.beyond.get(name, 0) + clipped(inner, x).sum()
            self.total[name] = self.total.get(name, 0) + x.numel()

        return count


def static_layers(model: nn.Module) -> dict[str, QuantLinear | QuantConv2d]:
    """The layers whose inputs have one scale, by full name; a convolution, which has no change of
    variable, and not the linear layer inside it."""
    found: dict[str, QuantLinear | QuantConv2d] = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[0] in found:
            continue
        inner = module.linear if isinstance(module, QuantConv2d) else module
        if isinstance(inner, QuantLinear) and inner.grid.static is not None:
            found[name] = module
    return found


def clipped(layer: QuantLinear, x: Tensor) -> Tensor:
    """[..., K] -> bool, True where an input is beyond its grid by more than a step.

    The rounding of a zero point alone moves the ends of a grid by up to half a step.
    """
    grid = layer.grid
    assert grid.fmt is not None and grid.static is not None
    scale, zero_point = grid.static
    q = grid.change.inputs(x) / scale + zero_point
    return (q < grid.fmt.qmin - 1) | (q > grid.fmt.qmax + 1)
