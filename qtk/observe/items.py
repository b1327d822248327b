"""One item of what a user calls data, as a sample or a batch, with its label if it has one.

"a text"      ("a text", 1)      {"text": "a text", "label": 1}
image         (image, 1)         {"image": image, "label": 1}          a path is an image too
{"input_ids": ids, "labels": y}  (pixels, y)       pixels              batches of tensors
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qtk.errors import CalibrationError
from qtk.models import main_input
from qtk.observe.images import is_image_object, reads_images

LABELS = ("labels", "label")
TEXTS = ("text", "sentence")  # the column that is read where a row has several strings
KINDS = "batches (dicts of tensors), only strings, or only images"


@dataclass(frozen=True)
class Item:
    """A sample or a batch.

    Attributes:
        kind: "text", "image" or "batch".
        content: a string; an image, its path or its pixels [C, H, W]; a dict of tensors.
        label: of a sample an int, a float, a string or None; of a batch a tensor or None.
        name: where it stands in the user's data, set by who reads that.
    """

    kind: str
    content: Any
    label: Any = None
    name: int | str = 0


def recognise(model: nn.Module, item: Any) -> Item:
    """What an item is.

    Raises:
        CalibrationError: nothing that the model could read.
    """
    if isinstance(item, (tuple, list)):
        return _of_tuple(model, item)
    if is_row(item):
        return _of_row(model, item)
    content = _tensor(item, model)
    if isinstance(content, str):
        return Item("image" if reads_images(model) else "text", str(content))
    if reads_images(model) and _is_image(content):
        return Item("image", content)
    if isinstance(content, Tensor):
        return Item("batch", {main_input(model): content})
    if is_image_object(content) or isinstance(content, os.PathLike):
        return Item("image", content)
    raise CalibrationError(f"calib holds a {type(item).__name__}; give {KINDS}")


def is_row(item: object) -> bool:
    """Whether an item has named fields: a dict, a BatchEncoding, a row of a data set."""
    return isinstance(item, Mapping) or (hasattr(item, "keys") and hasattr(item, "__getitem__"))


def columns(data: Any) -> Iterator[dict[str, Any]] | None:
    """The rows of {"text": [...], "label": [...]}; None where it holds tensors, or one row."""
    values = {key: data[key] for key in data.keys()}  # noqa: SIM118, not every row is a dict
    texts = [v for v in values.values() if not isinstance(v, (str, Tensor)) and _holds_strings(v)]
    if not texts:
        return None
    return (dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True))


def _holds_strings(values: Any) -> bool:
    try:
        return isinstance(next(iter(values)), str)
    except (TypeError, StopIteration):
        return False


def _of_tuple(model: nn.Module, item: Any) -> Item:
    """(content, label); a list of one is its content."""
    if not item:
        raise CalibrationError(f"calib holds an empty {type(item).__name__}; give {KINDS}")
    content, label = item[0], item[1] if len(item) > 1 else None
    if len(item) > 2:
        raise CalibrationError(
            f"calib holds a {type(item).__name__} of {len(item)}: give dicts that name what each "
            "part is, {'input_ids': ..., 'attention_mask': ..., 'labels': ...}"
        )
    found = recognise(model, content)
    if found.kind == "text" and isinstance(label, str) and label not in _label_names(model):
        raise CalibrationError(
            "calib holds pairs of strings: give (text, label), or for pairs of sentences the "
            "batches that tokenizer(first, second, padding=True, return_tensors='pt') makes"
        )
    if found.kind == "batch" and isinstance(label, Tensor) and _may_be_mask(found.content, label):
        raise CalibrationError(
            "calib holds pairs of equally long tensors: is the second one a mask or labels? Give "
            "dicts, {'input_ids': ..., 'attention_mask': ...}"
        )
    if found.kind == "batch" and not isinstance(label, Tensor):
        label = None
    return Item(found.kind, found.content, found.label if label is None else label)


def _of_row(model: nn.Module, row: Any) -> Item:
    """A batch of tensors, or a row of a data set: one text or image among its fields."""
    fields = {k: _tensor(row[k], model) for k in row.keys()}  # noqa: SIM118, as above
    label = next((fields[name] for name in LABELS if fields.get(name) is not None), None)
    fields = {k: v for k, v in fields.items() if k not in LABELS and v is not None}
    texts = {k: v for k, v in fields.items() if isinstance(v, str)}
    images = [v for v in fields.values() if is_image_object(v)]
    if any(isinstance(v, Tensor) for v in fields.values()) or not (texts or images):
        return Item("batch", fields, label if isinstance(label, Tensor) else None)
    if reads_images(model) and len(images) == 1:
        return Item("image", images[0], label)
    named = [texts[name] for name in TEXTS if name in texts]
    if len(texts) != 1 and not named:
        raise CalibrationError(
            f"calib holds rows of {sorted(fields)}: give the one text or image that the model "
            "reads, or batches of tensors"
        )
    kind = "image" if reads_images(model) else "text"
    return Item(kind, named[0] if named else next(iter(texts.values())), label)


def _tensor(value: Any, model: nn.Module) -> Any:
    """An array of numpy as the tensor that is meant; images stay arrays."""
    if not is_image_object(value) or hasattr(value, "convert"):
        return value
    is_pixels = value.ndim == 4 and value.dtype.kind == "f"
    if value.dtype.kind in "iuf" and (is_pixels or not reads_images(model)):
        return torch.as_tensor(value)
    return value


def _is_image(content: Any) -> bool:
    if isinstance(content, Tensor):
        return content.dim() == 3
    return is_image_object(content) or isinstance(content, os.PathLike)


def _label_names(model: nn.Module) -> dict[str, int]:
    return getattr(getattr(model, "config", None), "label2id", None) or {}


def _may_be_mask(batch: dict[str, Any], label: Tensor) -> bool:
    ids = batch.get("input_ids")
    same = ids is not None and ids.dim() > 1 and ids.shape == label.shape
    return same and bool(((label == 0) | (label == 1)).all())
