"""What a quantized model remembers of how it was made, and how it is put together again."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qtk.errors import CheckpointError, ModelError, SchemeError
from qtk.models import describe
from qtk.modules.attention import CHILD, QuantAttention, install
from qtk.modules.base import kind_of
from qtk.modules.embedding import QuantEmbedding
from qtk.modules.fused.block import FusedBlock, fuse
from qtk.modules.linear import QuantLinear
from qtk.scheme import AttentionScheme, Scheme

VERSION = 2  # of the layout on disk; a newer one is refused
# 2 brought quantized attention and patch embeddings; what has neither is written as 1
POSITIVE = (
    "input_scale", "input_channel_scale", "input_clip", "softmax_step",
)  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """One quantized linear: enough to build it empty and fill it from tensors."""

    scheme: Scheme
    bias: bool
    transform: bool
    rotation: bool = False
    sqnr: float | None = None  # dB of its output on the calibration data, when there was any

    def to_dict(self) -> dict[str, Any]:
        measured = self.sqnr is not None and math.isfinite(self.sqnr)  # JSON knows no infinity
        return {**asdict(self), "sqnr": self.sqnr if measured else None}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Layer":
        try:
            layer = cls(**{**data, "scheme": Scheme.from_dict(data["scheme"])})
            if layer.scheme.w is None:
                raise SchemeError("its weight is in floating point")
            return layer
        except (TypeError, KeyError, AttributeError, SchemeError) as error:
            raise CheckpointError(f"the checkpoint describes a layer badly: {error}") from None


@dataclass(frozen=True)
class Record:
    """What `quantize` did.

    Attributes:
        layers: by module name inside the base model (without "bert.", "model." or "vit.").
        recipe: method, rounding, ranges, calibration size, seed: for people to read.
        backend: what was asked for: "auto", "triton", "cpu" or "reference".
        attention: how every block's products and softmax compute, None for floating point.
    """

    layers: dict[str, Layer]
    recipe: dict[str, Any] = field(default_factory=dict)
    backend: str = "auto"
    attention: AttentionScheme | None = None

    def to_dict(self) -> dict[str, Any]:
        data = {
            "version": VERSION if self.attention else 1,
            "backend": self.backend,
            "recipe": self.recipe,
            "layers": {name: layer.to_dict() for name, layer in self.layers.items()},
        }
        return {**data, "attention": self.attention.to_dict()} if self.attention else data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Record":
        """Inverse of `to_dict`.

        Raises:
            CheckpointError: a newer version, or something missing.
        """
        version = data.get("version")
        if isinstance(version, bool) or not isinstance(version, int) or version < 1:
            raise CheckpointError("the checkpoint's quantization_config names no version")
        if version > VERSION:
            raise CheckpointError(
                f"the checkpoint is of layout {version}, this qtk reads up to {VERSION}; "
                "install a newer qtk"
            )
        layers, attention = data.get("layers"), data.get("attention")
        if not isinstance(layers, dict) or not (layers or attention):
            raise CheckpointError("the checkpoint's quantization_config lists no layers")
        try:
            scheme = None if attention is None else AttentionScheme.from_dict(attention)
        except (SchemeError, TypeError) as error:
            raise CheckpointError(f"the checkpoint describes attention badly: {error}") from None
        return cls(
            {name: Layer.from_dict(layer) for name, layer in layers.items()},
            data.get("recipe", {}), data.get("backend", "auto"), scheme,
        )  # fmt: skip


def base_name(model: nn.Module, name: str) -> str:
    """A module's name inside the base model, so that a head can be put on or taken off."""
    prefix = getattr(model, "base_model_prefix", "")
    if prefix and hasattr(model, prefix) and name.startswith(f"{prefix}."):
        return name.removeprefix(f"{prefix}.")
    return name


def full_name(model: nn.Module, name: str) -> str:
    """Inverse of `base_name`, for whichever of the two classes `model` is."""
    prefix = getattr(model, "base_model_prefix", "")
    if prefix and isinstance(getattr(model, prefix, None), nn.Module):
        inner = f"{prefix}.{name}"
        if has_module(model, inner):
            return inner
    return name


def has_module(model: nn.Module, name: str) -> bool:
    try:
        return isinstance(model.get_submodule(name), nn.Module)
    except AttributeError:
        return False


def quantized_layers(model: nn.Module) -> dict[str, QuantLinear | QuantEmbedding]:
    """The integer linears and embeddings of a model by full name."""
    kinds = (QuantLinear, QuantEmbedding)
    return {n: m for n, m in model.named_modules() if isinstance(m, kinds)}


def quantized_attentions(model: nn.Module) -> dict[str, QuantAttention]:
    """The quantized attention products of a model by full name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantAttention)}


def fused_blocks(model: nn.Module) -> dict[str, FusedBlock]:
    """The fused transformer blocks of a model by full name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, FusedBlock)}


def skeleton(model: nn.Module, record: Record) -> None:
    """Replaces the float linears that `record` lists by empty quantized ones, in place.

    A head or pooler that this class does not have is left out.

    Raises:
        CheckpointError: the model has no such linear, or ties its weight to another.
    """
    # "triton" and "cpu" are each what "auto" takes on their device, and weights are read on the CPU
    backend = "reference" if record.backend == "reference" else "auto"
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    shared = {*tied, *tied.values()}
    for name, layer in record.layers.items():
        full = full_name(model, name)
        owners = (model, getattr(model, "base_model", model))
        if not any(has_module(owner, name.partition(".")[0]) for owner in owners):
            continue
        if f"{full}.weight" in shared:
            raise CheckpointError(
                f"the checkpoint has a quantized {name!r}, which {type(model).__name__} shares "
                "with its head; load it as the class it was saved from"
            )
        module = model.get_submodule(full) if has_module(model, full) else None
        kind = kind_of(module)
        if kind is None:
            raise CheckpointError(
                f"the checkpoint has a quantized {name!r}, but {type(model).__name__} has no such "
                "layer; load it as the class it was saved from"
            )
        empty: nn.Module = kind.empty(
            module, layer.scheme, bias=layer.bias, transform=layer.transform,
            rotation=layer.rotation, backend=backend,
        )  # fmt: skip
        model.set_submodule(full, empty)
    if record.attention is not None:
        for block in describe(model):
            if block.anatomy is None:
                raise CheckpointError(f"quantized attention, which {block.name} cannot have")
            attention = block.anatomy.attention
            q: Any = model.get_submodule(f"{block.name}.{attention.q}")
            empty = QuantAttention(
                attention.heads, q.out_features // attention.heads, record.attention,
                backend=backend,
                device=next(q.buffers() if isinstance(q, QuantLinear) else q.parameters()).device,
            )  # fmt: skip
            model.get_submodule(f"{block.name}.{attention.module}").add_module(CHILD, empty)


def check_tensors(model: nn.Module) -> None:
    """Looks at everything that was read into a skeleton.

    Raises:
        CheckpointError: a tensor of another shape or type, a scale that is not a positive number,
            a number that is not finite.
    """
    for name, layer in {**quantized_layers(model), **quantized_attentions(model)}.items():
        for key, wanted in layer.blank().named_buffers(recurse=False):
            value = getattr(layer, key)
            fault = None if value.is_meta else _fault(key, value, wanted)
            if fault:
                raise CheckpointError(f"the checkpoint's {name}.{key} {fault}")


def _fault(key: str, value: Tensor, wanted: Tensor) -> str | None:
    """What is wrong with a tensor."""
    if value.shape != wanted.shape:
        return f"has shape {list(value.shape)}, it should have {list(wanted.shape)}"
    if value.dtype != wanted.dtype:
        return f"is {value.dtype}, it should be {wanted.dtype}"
    if value.is_floating_point() and not torch.isfinite(value).all():
        return "holds nan or inf"
    if key in POSITIVE and not (value > 0).all():
        return "holds a number that is not above zero"
    if key in ("weight_scale", "v_scale") and not value.all():
        return "holds a zero"
    return None


def finish(model: nn.Module) -> None:
    """Makes a filled skeleton run: kernels' layouts, fused blocks, no float gradients."""
    for layer in quantized_layers(model).values():
        layer.prepare()
    for name, products in quantized_attentions(model).items():
        install(model.get_submodule(name.rpartition(".")[0]), products)
    fuse(model, describe(model))
    model.requires_grad_(False)


def check_float(model: nn.Module) -> None:
    """Raises ModelError when the model is already quantized, by qtk or others, or not finite."""
    if quantized_layers(model) or getattr(model.config, "quantization_config", None) is not None:
        raise ModelError(
            f"{type(model).__name__} is already quantized; start from the floating-point model"
        )
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ModelError(f"the model's {name} holds nan or inf; load its weights again")
