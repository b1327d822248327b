"""Corruptions, a file a collection: what weather, optics and compression do to a picture.

A part has `NAMES`, the corruptions that it knows, and
`corrupt(name, image, severity, seed) -> image`: [H, W, 3] uint8 of `SIDE` pixels at least, severity
1 to 5, the same image for the same seed.
"""

from typing import Protocol

import numpy as np

from qtk.discover import available, load


class Collection(Protocol):
    """What a file of this folder has."""

    NAMES: tuple[str, ...]
    SIDE: int

    def corrupt(self, name: str, image: np.ndarray, severity: int, seed: int) -> np.ndarray:
        """[H, W, 3] uint8 -> [H, W, 3] uint8."""
        ...


def names() -> dict[str, str]:
    """Every corruption, with the file that knows it."""
    files = available("robust.corrupt")
    return {name: file for file in files for name in load("robust.corrupt", file).NAMES}
