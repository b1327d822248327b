"""A quantized model as a graph of ONNX whose quantized layers are single nodes still.

PyTorch's exporter writes what stays in floating point, whatever family, head and release of
transformers it is of; each quantized layer is one node of the domain "qtk" with the layer's name,
for `_layers.py` to write from its `LinearSpec`.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qtk import tracing
from qtk.errors import ModelError, SchemeError
from qtk.modules.attention import QuantAttention
from qtk.modules.conv import QuantConv2d
from qtk.modules.embedding import QuantEmbedding
from qtk.modules.floats import restore_floats
from qtk.modules.linear import QuantLinear

DOMAIN = "qtk"
OPSET = 20  # the first with Gelu


class Placeholder(nn.Module):
    """One node in the graph, in the place of a quantized layer of N output channels."""

    def __init__(self, kind: str, name: str, width: int) -> None:
        super().__init__()
        self.kind, self.name, self.width = kind, name, width
        self.register_buffer("weight", torch.zeros(0), persistent=False)  # some look at its dtype

    def forward(self, x: Tensor) -> Tensor:
        inner = x.shape if self.kind == "Embedding" else x.shape[:-1]
        y: Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{self.kind}", (x,), {"layer": self.name}, dtype=torch.float32,
            shape=(*inner, self.width), version=1,
        )  # fmt: skip
        return y


def skeleton(model: Any) -> Any:
    """A float32 copy on the CPU with placeholders for its quantized layers; attention is float.

    Raises:
        SchemeError: a softmax that is computed in codes.
    """
    for name, attention in model.named_modules():
        if isinstance(attention, QuantAttention) and attention.scheme.softmax != "float":
            raise SchemeError(
                f"{name} has a {attention.scheme.softmax!r} softmax, which other runtimes have no "
                "operation for; quantize with softmax='float'"
            )
    empty = copy.deepcopy(model)
    for name, layer in list(empty.named_modules()):
        if isinstance(layer, (QuantLinear, QuantEmbedding)) and not _in_patches(empty, name):
            kind, width = "Linear", layer.out_features
            if isinstance(layer, QuantEmbedding):
                kind, width = "Embedding", layer.in_features
            empty.set_submodule(name, Placeholder(kind, name, width))
    restore_floats(empty)
    empty.set_attn_implementation("eager")  # PyTorch's own traces to Where and IsNaN besides
    if hasattr(empty.config, "use_cache"):
        empty.config.use_cache = False
    return nn.Module.float(nn.Module.to(empty, "cpu")).eval()


def traced(model: Any, batch: Mapping[str, Tensor], outputs: tuple[str, ...]) -> Any:
    """The `onnx.ModelProto` of a skeleton, with dynamic axes for batch and tokens.

    Args:
        outputs: the fields of what it returns that the graph has.
    """
    axes = {name: tracing.dynamic_axes(name, value) for name, value in batch.items()}
    named = tracing.Named(model, tuple(batch), outputs).eval()
    try:
        with torch.no_grad(), tracing.Quietly():
            program = torch.export.export(
                named, tuple(batch.values()), dynamic_shapes=(tuple(axes.values()),), strict=False
            )
            found: Any = torch.onnx.export(
                program, dynamo=True, input_names=list(batch), output_names=list(outputs),
                opset_version=OPSET, verbose=False,
            )  # fmt: skip
    except Exception as error:
        raise ModelError(
            f"PyTorch cannot trace {type(model).__name__}: {str(error)[:500]}"
        ) from error
    return found.model_proto


def _in_patches(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), QuantConv2d)
