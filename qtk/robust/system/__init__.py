"""System noise, a file a cause: what differs between the machine a model was trained on and the one
it is deployed on (SysNoise, Sun et al. 2023, arXiv 2307.00280).

A part has `VARIANTS`, {name: function}, the first of which is what the model was trained with, and
`STAGE`, what its functions take and give:

    "file"      encoded bytes -> [H, W, 3] uint8
    "size"      [H, W, 3] uint8, (height, width) -> [height, width, 3] uint8
    "image"     [H, W, 3] uint8 -> [H, W, 3] uint8
    "pixels"    normalised pixels [N, C, H, W], mean, std -> the same as the model would get them
    "model"     the model -> another that computes in another arithmetic
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

STAGES = ("file", "size", "image", "pixels", "model")


class Noise(Protocol):
    """What a file of this folder has."""

    STAGE: str
    VARIANTS: Mapping[str, Callable[..., Any]]
