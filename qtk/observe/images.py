"""Images to pixel values, one after the other, so that one decoded image is held at a time."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qtk.errors import CalibrationError
from qtk.observe.beside import beside
from qtk.observe.guard import reading

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # of PIL, by the model's channels


class Unreadable(CalibrationError):
    """One image that cannot be decoded."""


def is_image_object(item: object) -> bool:
    """Whether it is an image of PIL or an array of numpy; looks at the type, decodes nothing."""
    return hasattr(type(item), "__array_interface__")


def reads_images(model: nn.Module) -> bool:
    return getattr(model, "main_input_name", None) == "pixel_values"


def find_processor(model: nn.Module, processor: Any) -> Any:
    """The processor given (one, a folder or a hub name), or the one beside the model.

    Raises:
        CalibrationError: there is none, or what was given is none, or pillow is missing.
    """
    _pillow()
    if processor is None or isinstance(processor, (str, os.PathLike)):
        return beside(model, "AutoImageProcessor", processor, backend="pil")
    if not callable(processor) or hasattr(processor, "pad_token"):
        raise CalibrationError(
            f"a {type(processor).__name__} is not an image processor; pass tokenizer="
        )
    return processor


def pixel_values(model: nn.Module, image: Any, processor: Any, name: object) -> Tensor:
    """One image as the model reads it.

    Args:
        image: a path, an image of PIL, an array [H, W] or [H, W, C] of bytes, or a tensor
            [C, H, W] that is ready.
        name: of the image, for errors.

    Returns:
        [1, C, H, W].

    Raises:
        Unreadable: the file is not an image, or is far too large.
        CalibrationError: the processor cannot read the image.
    """
    if isinstance(image, Tensor):
        return image[None]
    if isinstance(image, (str, os.PathLike)):
        image = _open(Path(image), model)
    with reading(f"image {name}"):
        out = processor([_in_colours(image, model)], return_tensors="pt")
        return torch.as_tensor(out["pixel_values"])


def _mode(model: nn.Module) -> str:
    config: Any = model.config
    return MODES.get(getattr(config, "num_channels", 3), "RGB")


def _open(path: Path, model: nn.Module) -> Any:
    """The decoded image; its file is closed again."""
    library = _pillow()
    try:
        with library.open(path) as file:
            return file.convert(_mode(model))
    except Exception as error:  # decoders raise what they like: OSError, SyntaxError, struct.error
        raise Unreadable(f"{path} is not an image that can be read ({error})") from error


def _in_colours(image: Any, model: nn.Module) -> Any:
    """The image in as many channels as the model has."""
    if not hasattr(image, "convert"):
        if getattr(image, "ndim", 3) != 2:
            return image
        image = _pillow().fromarray(image)
    return image if image.mode == _mode(model) else image.convert(_mode(model))


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise CalibrationError("images need pillow: pip install 'qtk-torch[images]'") from error
    return Image
