"""The range with the smallest squared error, weighted by what each channel does to the output."""

from torch import Tensor

from qtk.ranges import Range
from qtk.ranges.mse import search
from qtk.scheme import Format


def find(batches: list[Tensor], fmt: Format, importance: Tensor) -> Range:
    return search(batches, fmt, importance)
