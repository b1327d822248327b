"""The range with the smallest squared error, weighted by what each channel does to the output."""

from torch import Tensor

from qtk.ranges import Range
from qtk.ranges.mse import search, search_clip
from qtk.scheme import Format


def find(batches: list[Tensor], fmt: Format, importance: Tensor) -> Range:
    return search(batches, fmt, importance)


def find_clip(batches: list[Tensor], fmt: Format, importance: Tensor) -> float:
    return search_clip(batches, fmt, importance)
