"""The whole range: no value of the calibration data is clipped."""

import torch
from torch import Tensor

from qtk.ranges import Range
from qtk.scheme import Format


def find(batches: list[Tensor], fmt: Format, importance: Tensor) -> Range:
    return (
        torch.stack([x.min() for x in batches]).min(),
        torch.stack([x.max() for x in batches]).max(),
    )
