"""Calibration data in any form to batches that the model reads."""

import logging
import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qtk.errors import CalibrationError
from qtk.observe.check import check
from qtk.observe.files import IMAGES, class_of, draw_lines, image_files, is_image, lines
from qtk.observe.guard import reading
from qtk.observe.images import (
    Unreadable,
    find_processor,
    is_image_object,
    pixel_values,
    reads_images,
)
from qtk.observe.items import KINDS, Item, columns, is_row, recognise
from qtk.observe.tokens import Batch, Unknown, encode, find_tokenizer

logger = logging.getLogger("qtk")

SAMPLES = 256  # sentences or images taken from a file or folder
BATCH_SIZE = 32
SORTED = 4096  # texts that are sorted by length at once

T = TypeVar("T")


@dataclass(frozen=True)
class Labelled:
    """One batch of B rows.

    Attributes:
        batch: what the model is called with.
        labels: a tensor as it was given, a list of B, or None.
        names: of the B rows: their positions in a list, "line 7" of a file, an image's path.
        judged: [B, T] bool, the tokens that count; None for all that are no padding.
    """

    batch: Batch
    labels: Any
    names: list[int | str]
    judged: Tensor | None = None


def prepare(
    model: nn.Module, calib: Any, tokenizer: Any = None, seed: int = 0, samples: int = SAMPLES
) -> list[Batch]:
    """Batches on the model's device, checked.

    Args:
        calib: one batch or an iterable of batches (dicts of tensors, or tensors), of strings, of
            images or their paths; pairs of one of these and a label; rows of a data set; or a path
            to a text file (one sample a line) or a folder of images.
        tokenizer: a tokenizer or image processor, or its folder; looked for beside the model when
            it is needed.
        samples: how many a file or folder gives at most.

    Raises:
        CalibrationError: empty, not finite, of the wrong kind, or tokens beyond the vocabulary.
    """
    return [part.batch for part in stream(model, calib, tokenizer, seed, samples)]


def stream(
    model: nn.Module, data: Any, tokenizer: Any = None, seed: int = 0, samples: int | None = None
) -> Iterator[Labelled]:
    """What `prepare` gives, one batch after the other, with labels and names.

    Args:
        samples: how many a file or folder gives at most; None for all, in order.

    Raises:
        CalibrationError: as `prepare`.
    """
    items = _items(model, data, seed, samples)
    first = next(items, None)
    if first is None:
        raise CalibrationError("calib is empty: give at least one batch, or calib=None for none")
    items = _alike(first.kind, chain([first], items))
    make = {"text": _texts, "image": _images, "batch": _batches}[first.kind]
    for index, part in enumerate(make(model, items, tokenizer)):
        yield replace(part, batch=check(model, part.batch, index))


def _items(model: nn.Module, data: Any, seed: int, samples: int | None) -> Iterator[Item]:
    """The data as samples or batches, whatever form it has."""
    if isinstance(data, (str, os.PathLike)):
        yield from _of_path(Path(data), seed, samples)
        return
    if is_row(data):
        data = columns(data) or [data]
    elif isinstance(data, Tensor) or hasattr(data, "convert"):
        data = [data]
    elif is_image_object(data):
        data = _of_array(data)
    if not isinstance(data, Iterable):
        raise CalibrationError(
            f"calib is a {type(data).__name__}; give batches (dicts of tensors), a list of "
            "strings, or a path to a text file or a folder of images"
        )
    for i, item in enumerate(data):
        yield replace(recognise(model, item), name=i)


def _of_array(data: Any) -> Iterable[Any]:
    """An array of numpy: of strings, of ids [B, T], of images [B, H, W, C], or one image."""
    if data.dtype.kind in "USO" or (data.ndim == 4 and data.dtype.kind != "f"):
        return data.tolist() if data.ndim == 1 else list(data)
    return [data]


def _of_path(path: Path, seed: int, samples: int | None) -> Iterator[Item]:
    """The lines of a text file, the images of a folder, or one image."""
    try:
        exists = path.exists()
    except OSError:  # a text for a name, perhaps
        exists = False
    if not exists:
        raise CalibrationError(f"calib path {str(path)[:200]!r} does not exist")
    if is_image(path):
        yield Item("image", path, name=path.name)
    elif path.is_file():
        found = lines(path) if samples is None else iter(draw_lines(path, seed, samples))
        empty = True
        for number, text in found:
            empty = False
            yield Item("text", text, name=f"line {number}")
        if empty:
            raise CalibrationError(f"{path} holds no text lines")
    else:
        yield from _of_folder(path, seed, samples)


def _of_folder(folder: Path, seed: int, samples: int | None) -> Iterator[Item]:
    files = image_files(folder)
    if not files:
        raise CalibrationError(f"{folder} holds no text lines and no images {IMAGES}")
    if samples is not None:
        files = random.Random(seed).sample(files, min(samples, len(files)))
    for path in files:
        name = str(path.relative_to(folder))
        yield Item("image", path, class_of(folder, path), name)


def _alike(kind: str, items: Iterable[Item]) -> Iterator[Item]:
    """The items, all of one kind."""
    for item in items:
        if item.kind != kind:
            raise CalibrationError(f"calib holds both {kind} and {item.kind}; give {KINDS}")
        yield item


def _texts(model: nn.Module, items: Iterator[Item], tokenizer: Any) -> Iterator[Labelled]:
    """Texts, longest with longest so that little is padding."""
    parts = _in_parts((item for item in items if item.content.strip()), SORTED)
    first = next(parts, None)
    if first is None:
        raise CalibrationError("calib holds only empty strings; give sentences")
    tokenizer = find_tokenizer(model, tokenizer)
    unknown = Unknown(tokenizer)
    for part in chain([first], parts):
        ordered = sorted(part, key=lambda item: len(item.content))
        found = []
        for rows in _in_parts(ordered, BATCH_SIZE):
            batch = encode(model, tokenizer, [item.content for item in rows])
            unknown.count(batch)
            found.append(_labelled(batch, rows))
        unknown.check()
        yield from found


def _images(model: nn.Module, items: Iterator[Item], processor: Any) -> Iterator[Labelled]:
    """Images, of which files that cannot be read are left out."""
    if not reads_images(model):
        main = getattr(model, "main_input_name", "input_ids")
        raise CalibrationError(f"calib holds images, but {type(model).__name__} reads {main!r}")
    unreadable: list[Unreadable] = []
    read = 0
    for part in _in_parts(_pixels(model, items, processor, unreadable), BATCH_SIZE):
        with reading("images of different sizes"):
            batch = {"pixel_values": torch.cat([pixels for _, pixels in part])}
        read += len(part)
        yield _labelled(batch, [item for item, _ in part])
    if unreadable and not read:
        raise CalibrationError(f"none of {len(unreadable)} images can be read: {unreadable[0]}")
    if unreadable:
        logger.warning(
            "%d of %d images cannot be read and are left out; the first: %s",
            len(unreadable), len(unreadable) + read, unreadable[0],
        )  # fmt: skip


def _pixels(
    model: nn.Module, items: Iterator[Item], processor: Any, unreadable: list[Unreadable]
) -> Iterator[tuple[Item, Tensor]]:
    """[1, C, H, W] of each image; files that cannot be read go to the list."""
    found = None
    for item in items:
        if isinstance(item.content, Tensor):
            yield item, item.content[None]
            continue
        found = found or find_processor(model, processor)
        try:
            pixels = pixel_values(model, item.content, found, item.name)
        except Unreadable as error:
            unreadable.append(error)
            continue
        yield item, pixels


def _batches(model: nn.Module, items: Iterator[Item], _: Any) -> Iterator[Labelled]:
    """Batches as they are, their rows counted."""
    row = 0
    for item in items:
        sizes = (len(v) for v in item.content.values() if isinstance(v, Tensor) and v.dim())
        size = next(sizes, 1)
        yield Labelled(item.content, item.label, list(range(row, row + size)))
        row += size


def _labelled(batch: Batch, items: list[Item]) -> Labelled:
    labels = [item.label for item in items]
    known = any(label is not None for label in labels)
    return Labelled(batch, labels if known else None, [item.name for item in items])


def _in_parts(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size`, the last one shorter."""
    items = iter(items)
    while part := list(islice(items, size)):
        yield part
