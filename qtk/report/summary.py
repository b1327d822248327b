"""What every layer of a quantized model is, and what really runs it."""

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from qtk import checkpoint
from qtk.integrations.transformers import record_of
from qtk.models import describe


@dataclass(frozen=True)
class LayerSummary:
    """One linear layer.

    Attributes:
        scheme: "W8A8", or "float".
        kernel: the name of what computes it on this machine.
        fused: the layer runs inside a fused block.
        bytes, float_bytes: of the weight as stored, and as float32.
        sqnr: of the layer's output on the calibration data, dB; None where it was not measured.
    """

    name: str
    scheme: str
    kernel: str
    fused: bool
    bytes: int
    float_bytes: int
    sqnr: float | None


@dataclass(frozen=True)
class Summary:
    """A quantized model, layer by layer.

    Attributes:
        layers: the linears of the blocks, in order.
        recipe: how it was made.
        other_bytes: of everything else: embeddings, norms, heads.
    """

    layers: tuple[LayerSummary, ...]
    recipe: dict[str, Any]
    other_bytes: int

    @property
    def bytes(self) -> int:
        return sum(layer.bytes for layer in self.layers)

    @property
    def float_bytes(self) -> int:
        return sum(layer.float_bytes for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "bytes": self.bytes, "float_bytes": self.float_bytes}

    def table(self) -> str:
        """Plain text, a line a layer, and the totals."""
        head = ("layer", "scheme", "kernel", "fused", "kB", "of fp32", "SQNR dB")
        rows = [head, *(self._row(layer) for layer in self.layers)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = [
            "  ".join(c.ljust(n) for c, n in zip(r, widths, strict=True)).rstrip() for r in rows
        ]
        total = f"linears {self.bytes / 1e6:.2f} MB of {self.float_bytes / 1e6:.2f} MB in float32"
        total += f"; the rest {self.other_bytes / 1e6:.2f} MB"
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], "", total])

    @staticmethod
    def _row(layer: LayerSummary) -> tuple[str, ...]:
        return (
            layer.name, layer.scheme, layer.kernel, "yes" if layer.fused else "no",
            f"{layer.bytes / 1e3:.1f}", f"{layer.bytes / layer.float_bytes:.3f}",
            "-" if layer.sqnr is None else f"{layer.sqnr:.1f}",
        )  # fmt: skip


def summary(qmodel: nn.Module) -> Summary:
    """Every linear of the blocks: its scheme, its kernel, its size and its error.

    Raises:
        ModelError: the model was not quantized by qtk.
    """
    record = record_of(qmodel)
    quantized = checkpoint.quantized_layers(qmodel)
    fused = {n for n, block in checkpoint.fused_blocks(qmodel).items() if block.is_fused}
    layers, counted = [], 0
    for block in describe(qmodel):
        for name in (n for group in block.groups for n in group.linears):
            layer = quantized.get(name)
            if layer is None:
                linear: Any = qmodel.get_submodule(name)
                size = linear.weight.numel() * linear.weight.element_size()
                row = LayerSummary(
                    name, "float", f"torch.nn.functional.linear {linear.weight.dtype}", False, size,
                    4 * linear.weight.numel(), None,
                )  # fmt: skip
            else:
                size = layer.stored_weight().numel() + 4 * layer.weight_scale.numel()
                row = LayerSummary(
                    name, layer.scheme.name, layer.kernel, block.name in fused, size,
                    4 * layer.in_features * layer.out_features,
                    record.layers[checkpoint.base_name(qmodel, name)].sqnr,
                )  # fmt: skip
            layers.append(row)
            counted += size
    total = sum(t.numel() * t.element_size() for t in qmodel.state_dict().values())
    return Summary(tuple(layers), record.recipe, total - counted)
