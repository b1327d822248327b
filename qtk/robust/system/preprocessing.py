"""Pixels that reach the model as int8: one affine grid for all channels of the normalised image."""

import torch
from torch import Tensor

from qtk.numerics import fake_quantize, scale_and_zero_point
from qtk.scheme import Format

STAGE = "pixels"
FMT = Format(8, symmetric=False, granularity="tensor")


def float32(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return pixels


def int8(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """On the grid of -128 to 127 that covers what black and white become."""
    ends = torch.cat([-mean / std, (1 - mean) / std])
    return fake_quantize(pixels, *scale_and_zero_point(ends.min(), ends.max(), FMT), FMT)


VARIANTS = {"float32": float32, "int8": int8}
