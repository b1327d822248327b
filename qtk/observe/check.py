"""Whether a model can read a batch, asked before it is run."""

from typing import Any

import torch
from torch import Tensor, nn

from qtk.errors import CalibrationError
from qtk.models import is_network, main_input
from qtk.observe.images import reads_images
from qtk.observe.tokens import Batch, positions, reads_choices


def check(model: nn.Module, batch: Batch, index: int) -> Batch:
    """The batch on the model's device, floats in its dtype.

    Raises:
        CalibrationError: an input is missing, empty, not finite, of another shape, or names what
            the model does not have.
    """
    where = f"calibration batch {index}"
    _check_names(model, batch, where)
    for name, value in batch.items():
        _check_value(name, value, where)
    if not is_network(model):  # whose own inputs may have these names
        _check_tokens(model, batch, where)
    pixels = batch.get("pixel_values")
    if reads_images(model) and pixels is not None and pixels.dim() != 4:
        raise CalibrationError(
            f"{where}: pixel_values have shape {list(pixels.shape)}; it must be "
            "[batch, channels, height, width]"
        )
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    device = next(model.parameters()).device
    return {
        name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
        for name, value in batch.items()
    }


def _check_tokens(model: nn.Module, batch: Batch, where: str) -> None:
    if batch.get("input_ids") is not None:
        _check_ids(model, batch["input_ids"], where)
    _check_indices(model, batch, where)
    _check_embeddings(model, batch.get("inputs_embeds"), where)
    _check_mask(batch, where)


def _check_names(model: nn.Module, batch: Batch, where: str) -> None:
    main, cls = main_input(model), type(model).__name__
    embedded = "inputs_embeds" in batch and not (reads_images(model) or is_network(model))
    if main not in batch and not embedded:
        raise CalibrationError(
            f"{where} has {sorted(map(str, batch))}, but {cls} reads {main!r}; "
            "is this the right tokenizer or image processor?"
        )
    if main in batch and embedded:
        raise CalibrationError(f"{where} has both {main!r} and 'inputs_embeds': leave one out")


def _check_value(name: str, value: Any, where: str) -> None:
    if not isinstance(value, Tensor):
        raise CalibrationError(
            f"{where}: {name!r} is a {type(value).__name__}, not a tensor; "
            "call the tokenizer with return_tensors='pt', and leave other columns out"
        )
    if value.is_meta or value.layout != torch.strided:
        kind = "on the meta device" if value.is_meta else f"of layout {value.layout}"
        raise CalibrationError(f"{where}: {name!r} is {kind}; give an ordinary tensor")
    if value.numel() == 0:
        raise CalibrationError(f"{where}: {name!r} is empty, shape {list(value.shape)}")
    if value.is_floating_point() and not torch.isfinite(value).all():
        raise CalibrationError(f"{where}: {name!r} holds nan or inf; drop or repair the batch")


def _check_ids(model: nn.Module, ids: Tensor, where: str) -> None:
    if ids.dtype not in (torch.int64, torch.int32):
        raise CalibrationError(f"{where}: input_ids are {ids.dtype}; they must be int64")
    if ids.dim() != 2 and not (ids.dim() == 3 and reads_choices(model)):
        wanted = "[batch, choices, tokens]" if reads_choices(model) else "[batch, tokens]"
        raise CalibrationError(
            f"{where}: input_ids have shape {list(ids.shape)}; it must be {wanted}"
        )
    vocabulary = getattr(model.config, "vocab_size", None)
    lowest, highest = int(ids.min()), int(ids.max())
    if vocabulary and (highest >= vocabulary or lowest < 0):
        worst = lowest if lowest < 0 else highest
        raise CalibrationError(
            f"{where}: token id {worst} is outside the model's vocabulary of {vocabulary}; "
            "this is another model's tokenizer"
        )
    limit = positions(model)
    if limit and ids.shape[-1] > limit:
        raise CalibrationError(
            f"{where}: {ids.shape[-1]} tokens, but the model has {limit} positions; "
            "truncate to that length"
        )


def _check_indices(model: nn.Module, batch: Batch, where: str) -> None:
    """Position and segment ids, which look rows up in tables as token ids do."""
    for name, size in (
        ("position_ids", "max_position_embeddings"), ("token_type_ids", "type_vocab_size"),
    ):  # fmt: skip
        values, limit = batch.get(name), getattr(model.config, size, None)
        if values is None or not limit:
            continue
        lowest, highest = int(values.min()), int(values.max())
        if lowest < 0 or highest >= limit:
            raise CalibrationError(
                f"{where}: {name} from {lowest} to {highest}, but the model has {limit} of them"
            )


def _check_embeddings(model: nn.Module, embeddings: Tensor | None, where: str) -> None:
    find = getattr(model, "get_input_embeddings", None)
    if embeddings is None or find is None:
        return
    width = getattr(find(), "embedding_dim", None)
    if embeddings.dim() != 3 or (width and embeddings.shape[-1] != width):
        raise CalibrationError(
            f"{where}: inputs_embeds have shape {list(embeddings.shape)}; it must be "
            f"[batch, tokens, {width}]"
        )


def _check_mask(batch: Batch, where: str) -> None:
    mask, ids = batch.get("attention_mask"), batch.get("input_ids")
    if mask is None:
        return
    if mask.dim() <= 3 and ids is not None and mask.dim() == ids.dim() and mask.shape != ids.shape:
        raise CalibrationError(
            f"{where}: attention_mask has shape {list(mask.shape)}, input_ids {list(ids.shape)}"
        )
    if not mask.bool().any():
        raise CalibrationError(f"{where}: attention_mask hides every token")
