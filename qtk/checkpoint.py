"""What a quantized model remembers of how it was made, and how it is put together again."""

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from qtk.errors import CheckpointError, ModelError, SchemeError
from qtk.models import describe
from qtk.modules.block import FusedBlock, fuse
from qtk.modules.linear import QuantLinear
from qtk.scheme import Scheme

VERSION = 1  # of the layout on disk; a newer one is refused


@dataclass(frozen=True)
class Layer:
    """One quantized linear: enough to build it empty and fill it from tensors."""

    scheme: Scheme
    bias: bool
    transform: bool
    rotation: bool = False
    sqnr: float | None = None  # dB of its output on the calibration data, when there was any

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Layer":
        try:
            return cls(**{**data, "scheme": Scheme.from_dict(data["scheme"])})
        except (TypeError, KeyError, AttributeError, SchemeError) as error:
            raise CheckpointError(f"the checkpoint describes a layer badly: {error}") from None


@dataclass(frozen=True)
class Record:
    """What `quantize` did.

    Attributes:
        layers: by module name inside the base model (without "bert.", "model." or "vit.").
        recipe: method, rounding, ranges, calibration size, seed: for people to read.
        backend: what was asked for: "auto", "triton", "cpu" or "reference".
    """

    layers: dict[str, Layer]
    recipe: dict[str, Any] = field(default_factory=dict)
    backend: str = "auto"
    version: int = VERSION

    def to_dict(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "backend": self.backend,
            "recipe": self.recipe,
            "layers": {name: layer.to_dict() for name, layer in self.layers.items()},
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Record":
        """Inverse of `to_dict`.

        Raises:
            CheckpointError: a newer version, or something missing.
        """
        version = data.get("version")
        if not isinstance(version, int):
            raise CheckpointError("the checkpoint's quantization_config names no version")
        if version > VERSION:
            raise CheckpointError(
                f"the checkpoint is of layout {version}, this qtk reads up to {VERSION}; "
                "install a newer qtk"
            )
        layers = data.get("layers")
        if not isinstance(layers, dict) or not layers:
            raise CheckpointError("the checkpoint's quantization_config lists no layers")
        return cls(
            {name: Layer.from_dict(layer) for name, layer in layers.items()},
            data.get("recipe", {}), data.get("backend", "auto"), version,
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
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def quantized_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """The integer linears of a model by full name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}


def fused_blocks(model: nn.Module) -> dict[str, FusedBlock]:
    """The fused transformer blocks of a model by full name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, FusedBlock)}


def skeleton(model: nn.Module, record: Record) -> None:
    """Replaces the float linears that `record` lists by empty quantized ones, in place.

    Raises:
        CheckpointError: the model has no such linear.
    """
    for name, layer in record.layers.items():
        full = full_name(model, name)
        linear = model.get_submodule(full) if has_module(model, full) else None
        if not isinstance(linear, nn.Linear):
            raise CheckpointError(
                f"the checkpoint has a quantized {name!r}, but {type(model).__name__} has no such "
                "linear; load it as the class it was saved from"
            )
        empty = QuantLinear(
            linear.in_features, linear.out_features, layer.scheme, bias=layer.bias,
            transform=layer.transform, rotation=layer.rotation, backend=record.backend, device=linear.weight.device,
        )  # fmt: skip
        model.set_submodule(full, empty)


def finish(model: nn.Module) -> None:
    """Makes a filled skeleton run: kernels' layouts, fused blocks, no float gradients."""
    for layer in quantized_layers(model).values():
        layer.prepare()
    fuse(model, describe(model))
    model.requires_grad_(False)


def check_float(model: nn.Module) -> None:
    """Raises ModelError when the model is already quantized, by qtk or by anything else."""
    if quantized_layers(model) or getattr(model.config, "quantization_config", None) is not None:
        raise ModelError(
            f"{type(model).__name__} is already quantized; start from the floating-point model"
        )
