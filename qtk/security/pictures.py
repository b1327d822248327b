"""Folders of images as one tensor, as the model reads them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qtk.errors import CalibrationError
from qtk.fidelity.labels import as_tensor, class_numbers
from qtk.observe.batches import stream


def pictures(model: nn.Module, folder: Path, processor: Any = None) -> Tensor:
    """[N, C, H, W].

    Args:
        processor: an image processor or its folder; looked for beside the model.

    Raises:
        CalibrationError: no images, or none that the model reads.
    """
    return torch.cat([_pixels(part.batch, folder) for part in stream(model, folder, processor)])


def labelled(model: nn.Module, folder: Path, processor: Any = None) -> tuple[Tensor, Tensor]:
    """[N, C, H, W] and [N], of a folder with a folder for each class.

    Raises:
        CalibrationError: likewise, or images without a class.
    """
    numbers, images, labels = class_numbers(model, folder), [], []
    for part in stream(model, folder, processor):
        own = as_tensor(part.labels, numbers)
        if own is None or bool((own < 0).any()):
            raise CalibrationError(
                f"{folder} holds images without a class of the model: put them in folders that "
                "have the classes' names"
            )
        images.append(_pixels(part.batch, folder))
        labels.append(own)
    return torch.cat(images), torch.cat(labels)


def _pixels(batch: dict[str, Tensor], folder: Path) -> Tensor:
    if "pixel_values" not in batch:
        raise CalibrationError(f"{folder} was read as {', '.join(batch)}: give a folder of images")
    return batch["pixel_values"].cpu()
