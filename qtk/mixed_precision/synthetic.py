"""Inputs made of nothing, for a search without data."""

from typing import Any

import torch
from torch import nn

from qtk.errors import CalibrationError
from qtk.observe import Batch
from qtk.observe.images import reads_images

ROWS = 32
TOKENS = 32


def synthetic(model: nn.Module, seed: int = 0, batches: int = 2) -> list[Batch]:
    """Random tokens, or images of normal noise, in batches of `ROWS`.

    Raises:
        CalibrationError: the model reads something else.
    """
    generator = torch.Generator().manual_seed(seed)
    config: Any = model.config
    device = next(model.parameters()).device
    if reads_images(model):
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (ROWS, config.num_channels, height, width)
        images = [torch.randn(shape, generator=generator) for _ in range(batches)]
        dtype = next(model.parameters()).dtype
        return [{"pixel_values": image.to(device, dtype)} for image in images]
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is None:
        raise CalibrationError(
            f"{type(model).__name__} reads neither tokens nor images: give calib"
        )
    first = min(1 + (getattr(config, "pad_token_id", None) or 0), vocabulary - 1)
    length = min(TOKENS, getattr(config, "max_position_embeddings", TOKENS) - 2)
    found: list[Batch] = []
    for _ in range(batches):
        ids = torch.randint(first, vocabulary, (ROWS, length), generator=generator).to(device)
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return found
