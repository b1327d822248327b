"""How a quantized model is put together again: built empty, looked at once filled, made ready."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qtk.errors import CheckpointError, ModelError
from qtk.models import Block, describe
from qtk.modules.attention import CHILD, QuantAttention, install
from qtk.modules.base import Quantized, kind_of
from qtk.modules.embedding import QuantEmbedding
from qtk.modules.fused.block import FusedBlock, fuse
from qtk.modules.linear import QuantLinear
from qtk.record import Layer, Record
from qtk.scheme import AttentionScheme, Scheme

POSITIVE = ("input_scale", "input_channel_scale", "input_clip", "softmax_step")
NOT_ZERO = ("weight_scale", "v_scale")


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


def replaced_layers(model: nn.Module) -> dict[str, Quantized]:
    """What stands in the place of float layers, by their names: a convolution as a whole."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, Quantized)}
    return {n: m for n, m in found.items() if n.rpartition(".")[0] not in found}


def quantized_attentions(model: nn.Module) -> dict[str, QuantAttention]:
    """The quantized attention products of a model by full name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantAttention)}


def fused_blocks(model: nn.Module) -> dict[str, FusedBlock]:
    """The fused transformer blocks of a model by full name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, FusedBlock)}


def skeleton(model: nn.Module, record: Record) -> None:
    """Replaces the float modules that `record` lists by empty quantized ones, in place.

    A head or pooler that this class does not have is left out.

    Raises:
        CheckpointError: the model has no such module, or ties its weight to another.
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
        _empty(model, name, full, layer, backend)
    for name in record.folded:
        full = full_name(model, name)
        if not has_module(model, full):
            raise CheckpointError(
                f"the checkpoint has folded {name!r}, but {type(model).__name__} has no such norm; "
                "load it as the class it was saved from"
            )
        model.set_submodule(full, nn.Identity())
    if record.attention is not None:
        for block in describe(model):
            _add_attention(model, block, record.attention, backend)


def rebuild(
    model: nn.Module, block: Block, layers: Mapping[str, Layer],
    attention: AttentionScheme | None, backend: str, tensors: Mapping[str, Tensor],
) -> None:  # fmt: skip
    """Puts a quantized block in the place of the float one, in place, ready to run.

    Args:
        layers: its linears by full name; the others stay as they are.
        tensors: the state_dict of the block.

    Raises:
        CheckpointError: the tensors are of another block.
    """
    for name, layer in layers.items():
        _empty(model, name, name, layer, backend)
    if attention is not None:
        _add_attention(model, block, attention, backend)
    module = model.get_submodule(block.name)
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{block.name}: what was kept does not fit: {error}") from None
    for name, layer_or_products in module.named_modules():
        if isinstance(layer_or_products, QuantAttention):
            install(module.get_submodule(name.rpartition(".")[0]), layer_or_products)
        elif isinstance(layer_or_products, QuantLinear):
            layer_or_products.prepare()


def _empty(model: nn.Module, name: str, full: str, layer: Layer, backend: str) -> None:
    """An empty quantized layer in the place of a float one."""
    module: Any = model.get_submodule(full) if has_module(model, full) else None
    kind = kind_of(module)
    if kind is None:
        raise CheckpointError(
            f"the checkpoint has a quantized {name!r}, but {type(model).__name__} has no such "
            "layer; load it as the class it was saved from"
        )
    empty: nn.Module = kind.empty(
        module, _fitted(layer.scheme, module.weight[0].numel()), bias=layer.bias,
        transform=layer.transform, rotation=layer.rotation, backend=backend,
    )  # fmt: skip
    model.set_submodule(full, empty)


def _add_attention(model: nn.Module, block: Block, scheme: AttentionScheme, backend: str) -> None:
    """Empty quantized products in a block."""
    if block.anatomy is None:
        raise CheckpointError(f"quantized attention, which {block.name} cannot have")
    attention = block.anatomy.attention
    q: Any = model.get_submodule(f"{block.name}.{attention.q}")
    products = QuantAttention(
        attention.heads, q.out_features // attention.heads, scheme, backend=backend,
        device=next(q.buffers() if isinstance(q, QuantLinear) else q.parameters()).device,
    )  # fmt: skip
    model.get_submodule(f"{block.name}.{attention.module}").add_module(CHILD, products)


def _fitted(scheme: Scheme, K: int) -> Scheme:
    """Groups longer than a row are the row: layouts 1 and 2 have such."""
    w = scheme.w
    if w is None or w.group_size is None or w.group_size <= K:
        return scheme
    return Scheme(replace(w, group_size=max(K, 1)), scheme.a)


def check_tensors(model: nn.Module) -> None:
    """Looks at every tensor that was read into a skeleton.

    Raises:
        CheckpointError: a tensor of another shape or type, a number that is not finite, a scale
            that is not above zero, a zero point off its grid.
    """
    looked_at = set()
    for name, key, value, wanted in _held(model):
        looked_at.add(id(value))
        fault = None if value.is_meta else _fault(model.get_submodule(name), key, value, wanted)
        if fault:
            raise CheckpointError(f"the checkpoint's {name}.{key} {fault}")
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if id(value) in looked_at or value.is_meta or not value.is_floating_point():
            continue
        if not torch.isfinite(value).all():
            raise CheckpointError(f"the checkpoint's {name} holds nan or inf")


def _held(model: nn.Module) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    """Module, key, tensor and what it should be like, of everything quantized."""
    for name, layer in {**quantized_layers(model), **quantized_attentions(model)}.items():
        for key, wanted in layer.blank().named_buffers(recurse=False):
            yield name, key, getattr(layer, key), wanted


def _fault(layer: nn.Module, key: str, value: Tensor, wanted: Tensor) -> str | None:
    """What is wrong with a tensor."""
    if value.shape != wanted.shape:
        return f"has shape {list(value.shape)}, it should have {list(wanted.shape)}"
    if value.dtype != wanted.dtype:
        return f"is {value.dtype}, it should be {wanted.dtype}"
    if value.is_floating_point() and not torch.isfinite(value).all():
        return "holds nan or inf"
    if key in POSITIVE and not (value > 0).all():
        return "holds a number that is not above zero"
    if key in NOT_ZERO and not value.all():
        return "holds a zero"
    if key == "input_clip" and not (value <= 1).all():
        return f"is {float(value):.6g}, a share of a token's maximum is at most 1"
    scheme: Any = layer.scheme
    grid = None
    if isinstance(scheme, Scheme):
        grid = {"weight_zero_point": scheme.w, "input_zero_point": scheme.a}.get(key)
    if grid is not None and not ((value >= grid.qmin) & (value <= grid.qmax)).all():
        return f"holds a zero point outside {grid.qmin} to {grid.qmax}"
    return None


def run_on(model: nn.Module, backend: str) -> None:
    """Makes a finished model run on another backend.

    Raises:
        BackendError: there is no such backend, or it cannot run where the model is.
    """
    parts: list[Any] = [*quantized_layers(model).values(), *quantized_attentions(model).values()]
    for part in parts:
        part.unprepare()
        part.backend = backend
    for part in parts:
        part.prepare()
    for block in fused_blocks(model).values():
        block.prepare()


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
    config = getattr(model, "config", None)
    if quantized_layers(model) or getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"{type(model).__name__} is already quantized; start from the floating-point model"
        )
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ModelError(f"the model's {name} holds nan or inf; load its weights again")
