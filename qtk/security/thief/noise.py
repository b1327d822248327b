"""A thief without data: noise whose spectrum falls as 1/f, as that of photographs does."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

NEEDS_POOL = False


def queries(
    answer: Callable[[Tensor], Tensor], pool: Tensor, budget: int, generator: torch.Generator,
    learn: Callable[[Tensor, Tensor], nn.Module],
) -> Tensor:  # fmt: skip
    """Of the pool's shape; each image is stretched over the pool's range of values."""
    _, channels, height, width = pool.shape
    white = torch.randn(budget, channels, height, width, generator=generator)
    rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None]
    frequency = (rows.square() + columns.square()).sqrt().clamp(min=1 / max(height, width))
    pink = torch.fft.irfft2(torch.fft.rfft2(white) / frequency, s=(height, width))
    low, high = pink.amin((1, 2, 3), keepdim=True), pink.amax((1, 2, 3), keepdim=True)
    return pool.min() + (pink - low) / (high - low) * (pool.max() - pool.min())
