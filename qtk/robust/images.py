"""Images as every part sees them: pixels in [0, 1], with the normalisation inside the model."""

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qtk.errors import CalibrationError, ModelError
from qtk.fidelity.labels import class_numbers
from qtk.observe.files import class_of, image_files
from qtk.observe.guard import reading
from qtk.observe.images import find_processor

Normalize = tuple[Sequence[float], Sequence[float]]  # mean and std of each channel


@dataclass(frozen=True)
class Images:
    """What a model is tried on.

    Attributes:
        pixels: [N, C, H, W] float32 in [0, 1].
        labels: [N] int64.
        mean, std: of the normalisation that the model expects.
        files: the encoded bytes of each image, where the data came as files; else empty.
    """

    pixels: Tensor
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    files: tuple[bytes, ...] = ()

    def bytes_of_pixels(self) -> np.ndarray:
        """[N, H, W, C] uint8."""
        return as_bytes(self.pixels)


def as_bytes(pixels: Tensor) -> np.ndarray:
    """[N, C, H, W] in [0, 1] -> [N, H, W, C] uint8, rounded."""
    scaled = (pixels * 255).round().clamp(0, 255).to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).contiguous().numpy()


def as_pixels(images: np.ndarray) -> Tensor:
    """Inverse of `as_bytes`."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255


class Pixels(nn.Module):
    """A classifier that reads pixels in [0, 1]: [B, C, H, W] -> logits [B, classes].

    The model is not registered as a child: whoever moves this module does not rebuild its kernels.
    """

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self._held = (model,)
        at = next(p for p in model.parameters() if p.is_floating_point())
        self.mean, self.std = (
            torch.tensor(v, dtype=at.dtype, device=at.device).view(1, -1, 1, 1) for v in (mean, std)
        )
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = (x.to(self.mean) - self.mean) / self.std
        logits: Tensor = self._held[0](pixel_values=x).logits
        return logits.float()


@contextmanager
def frozen(*models: nn.Module | None) -> Iterator[None]:
    """Models in eval mode whose parameters take no gradients, and then as they were."""
    given = [model for model in models if model is not None]
    states = [(model, model.training) for model in given]
    wanted = [(p, p.requires_grad) for model in given for p in model.parameters()]
    try:
        for model in given:
            model.eval()
        for p, _ in wanted:
            p.requires_grad_(False)
        yield
    finally:
        for p, was in wanted:
            p.requires_grad_(was)
        for model, training in states:
            model.train(training)


def read(
    model: nn.Module, data: Any, processor: Any = None, normalize: Normalize | None = None,
    samples: int | None = None, seed: int = 0,
) -> Images:  # fmt: skip
    """Images and labels in any of the forms that `qtk.robustness` takes.

    Args:
        data: (pixels [N, C, H, W] in [0, 1] or uint8, labels [N]), a folder with a folder a class,
            or a list of (path, encoded bytes or PIL image, label).
        processor: image processor for files and for the normalisation; looked for beside the model.
        normalize: mean and std a channel, in the place of the processor's.
        samples: how many are drawn at most; all if None.

    Raises:
        CalibrationError: no images, pixels out of range, a wrong number of channels, or labels that
            are none of the model's classes.
        ModelError: the model has no classifier of images.
    """
    if getattr(model, "main_input_name", None) != "pixel_values" or not _has_logits(model):
        raise ModelError(
            f"no image head: this suite needs a classifier of images such as "
            f"ViTForImageClassification, not a {type(model).__name__}"
        )
    order = Random(seed)
    if _is_pair(data):
        pixels, labels = _tensors(*data)
        mean, std = _normalization(model, processor, normalize)
        if samples is not None and samples < len(pixels):
            chosen = sorted(order.sample(range(len(pixels)), samples))
            pixels, labels = pixels[chosen], labels[chosen]
        found = Images(pixels, labels, mean, std)
    else:
        found = _from_files(model, data, processor, normalize, samples, order)
    _check(model, found)
    return found


def decode(image: Any) -> Any:
    """A PIL image in RGB of encoded bytes, a path, or an image."""
    from PIL import Image

    if isinstance(image, (bytes, str, os.PathLike)):
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as file:
            return file.convert("RGB")
    return image.convert("RGB")


def _is_pair(data: Any) -> bool:
    return isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], (Tensor, np.ndarray))


def _has_logits(model: nn.Module) -> bool:
    return type(model).__name__.endswith(("ForImageClassification", "WithTeacher"))


def _tensors(pixels: Any, labels: Any) -> tuple[Tensor, Tensor]:
    pixels, labels = torch.as_tensor(pixels), torch.as_tensor(labels)
    if pixels.dtype == torch.uint8:
        pixels = pixels.float() / 255
    if pixels.dim() != 4 or labels.shape != pixels.shape[:1]:
        raise CalibrationError(
            f"pixels have shape {list(pixels.shape)} and labels {list(labels.shape)}: give "
            "[N, C, H, W] and [N]"
        )
    if labels.is_floating_point():
        raise CalibrationError("labels are floats: give the classes' numbers as integers")
    return pixels.float(), labels.long()


def _normalization(
    model: nn.Module, processor: Any, normalize: Normalize | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if normalize is None:
        try:
            processor = find_processor(model, processor)
        except CalibrationError as error:
            raise CalibrationError(f"{error}; or pass normalize=(mean, std)") from None
        if not getattr(processor, "do_normalize", True):
            channels = int(getattr(model.config, "num_channels", 3))
            return (0.0,) * channels, (1.0,) * channels
        normalize = processor.image_mean, processor.image_std
    mean, std = (tuple(float(v) for v in values) for values in normalize)
    if len(mean) != len(std) or min(std) <= 0:
        raise CalibrationError("normalize: give (mean, std), a number a channel, std above zero")
    return mean, std


def _from_files(
    model: nn.Module, data: Any, processor: Any, normalize: Normalize | None,
    samples: int | None, order: Random,
) -> Images:  # fmt: skip
    pairs = _pairs(model, data)
    if not pairs:
        raise CalibrationError("robustness: the data holds no image")
    if samples is not None and samples < len(pairs):
        pairs = [pairs[i] for i in sorted(order.sample(range(len(pairs)), samples))]
    mean, std = _normalization(model, processor, normalize)
    processor = find_processor(model, processor)
    files, pixels = [], []
    for place, (image, _) in enumerate(pairs):
        image = Path(image).read_bytes() if isinstance(image, (str, os.PathLike)) else image
        if isinstance(image, bytes):
            files.append(image)
        with reading(f"image {place}"):
            out = processor([decode(image)], return_tensors="pt", do_normalize=False)
        pixels.append(torch.as_tensor(out["pixel_values"]).float())
    labels = torch.tensor([label for _, label in pairs])
    complete = tuple(files) if len(files) == len(pairs) else ()
    return Images(torch.cat(pixels), labels, mean, std, complete)


def _pairs(model: nn.Module, data: Any) -> list[tuple[Any, int]]:
    if isinstance(data, (str, os.PathLike)):
        folder = Path(data)
        named = [(file, class_of(folder, file)) for file in image_files(folder)]
        if not folder.is_dir() or not named or any(name is None for _, name in named):
            raise CalibrationError(f"{folder} is not a folder with a folder of images a class")
        numbers = class_numbers(model, folder)
        return [(file, numbers[str(name).lower()]) for file, name in named]
    if not isinstance(data, Sequence) or not all(
        isinstance(item, (tuple, list)) and len(item) == 2 for item in data
    ):
        raise CalibrationError(
            "robustness takes (pixels, labels), a folder with a folder a class, or a list of "
            "(image, label)"
        )
    return [(image, int(label)) for image, label in data]


def _check(model: nn.Module, images: Images) -> None:
    config: Any = model.config
    pixels, labels = images.pixels, images.labels
    if not len(pixels):
        raise CalibrationError("robustness: the data holds no image")
    if not bool(((pixels >= 0) & (pixels <= 1)).all()):  # nan included
        raise CalibrationError(
            f"pixels lie in [{float(pixels.min()):.3g}, {float(pixels.max()):.3g}], not in [0, 1]: "
            "give them before normalisation, and say normalize=(mean, std)"
        )
    channels = int(getattr(config, "num_channels", 3))
    if not pixels.shape[1] == channels == len(images.mean):
        raise CalibrationError(
            f"the model reads {channels} channels; the images have {pixels.shape[1]}, the "
            f"normalisation {len(images.mean)}"
        )
    if int(labels.min()) < 0 or int(labels.max()) >= config.num_labels:
        raise CalibrationError(
            f"labels lie in {int(labels.min())} to {int(labels.max())}; the model's classes are 0 "
            f"to {config.num_labels - 1}"
        )
