"""Float weights to codes; one file a paper.

A rounder is a function `find(problem) -> (codes, scale)`:

    codes: [N, K] float32 holding integers in [-qmax, qmax]
    scale: [N, G] float32, G = 1 without groups
"""

from dataclasses import dataclass

from torch import Tensor

from qtk.scheme import Format


@dataclass(frozen=True)
class Problem:
    """One linear to be rounded.

    Attributes:
        weight: [N, K] float32, after the transform.
        fmt: the grid.
        inputs: [T, K] float32, the transformed and quantized rows that the linear will read;
            None without data.
        wanted: [T, N] float32, what the float model computes for those rows, without the bias;
            None without data.
    """

    weight: Tensor
    fmt: Format
    inputs: Tensor | None = None
    wanted: Tensor | None = None


Rounded = tuple[Tensor, Tensor]
