"""A quantized model as a graph of ONNX whose quantized layers are single nodes still.

PyTorch's exporter writes what stays in floating point, whatever family, head and release of
transformers it is of; each quantized layer is one node of the domain "qtk" with the layer's name,
for `_layers.py` to write from its `LinearSpec`.
"""

import copy
import logging
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qtk.errors import ModelError, SchemeError
from qtk.modules.attention import QuantAttention
from qtk.modules.conv import QuantConv2d
from qtk.modules.embedding import QuantEmbedding
from qtk.modules.floats import restore_floats
from qtk.modules.linear import QuantLinear
from qtk.observe.tokens import reads_choices

DOMAIN = "qtk"
OPSET = 20  # the first with Gelu
ROWS, TOKENS = 2, 8  # of the batch that is traced; both axes are dynamic


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


class Named(nn.Module):
    """A model with positional inputs, and those outputs that are tensors as a tuple."""

    def __init__(self, model: nn.Module, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.inputs, self.outputs = model, inputs, outputs

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        found = self.model(**dict(zip(self.inputs, args, strict=True)), return_dict=True)
        return tuple(found[name] for name in self.outputs)


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
    axes = {name: _axes(name, value) for name, value in batch.items()}
    named = Named(model, tuple(batch), outputs).eval()
    try:
        with torch.no_grad(), _Quietly():
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


@torch.no_grad()
def output_names(model: Any, batch: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The model's outputs that are tensors, in order."""
    found = model(**batch, return_dict=True)
    return tuple(name for name, value in found.items() if isinstance(value, Tensor))


def example(model: Any, rows: int = ROWS, tokens: int = TOKENS, seed: int = 0) -> dict[str, Tensor]:
    """A batch of random tokens or pixels with all inputs that a served model reads.

    The last row of tokens is padded, where there are several.
    """
    config, generator = model.config, torch.Generator().manual_seed(seed)
    if getattr(model, "main_input_name", "input_ids") == "pixel_values":
        size = config.image_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        shape = (rows, config.num_channels, height, width)
        return {"pixel_values": torch.randn(shape, generator=generator)}
    ids = torch.randint(3, config.vocab_size, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[-1, tokens - tokens // 3 :] = 0
        ids[mask == 0] = int(getattr(config, "pad_token_id", None) or 0)
    batch = completed(model, {"input_ids": ids, "attention_mask": mask})
    if reads_choices(model):
        batch = {name: value[:, None].expand(-1, 2, -1) for name, value in batch.items()}
    return batch


def completed(model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch with all inputs that the file has: the token types that BERT takes for zeros."""
    ids = batch.get("input_ids")
    if ids is None or getattr(model.config, "type_vocab_size", 0) < 2:
        return dict(batch)
    return {"token_type_ids": torch.zeros_like(ids), **batch}


def _axes(name: str, value: Tensor) -> dict[int, Any]:
    dynamic = torch.export.Dim.DYNAMIC
    return {0: dynamic} if name == "pixel_values" else dict.fromkeys(range(value.dim()), dynamic)


def _in_patches(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), QuantConv2d)


class _Quietly(warnings.catch_warnings):
    """Without the exporter's remarks on its own progress."""

    def __enter__(self) -> Any:
        self._disabled = logging.root.manager.disable
        logging.disable(max(self._disabled, logging.WARNING))
        found = super().__enter__()
        warnings.simplefilter("ignore")
        return found

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        logging.disable(self._disabled)
