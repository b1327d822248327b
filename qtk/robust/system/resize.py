"""Resizers: six of Pillow, which average when they shrink, and five of OpenCV, most of which do
not."""

from collections.abc import Callable
from functools import partial

import numpy as np

from qtk.robust.system._opencv import opencv

STAGE = "size"
Size = tuple[int, int]
PILLOW = ("bilinear", "nearest", "box", "hamming", "bicubic", "lanczos")
OPENCV = {"bilinear": "LINEAR", "nearest": "NEAREST", "area": "AREA", "bicubic": "CUBIC",
          "lanczos": "LANCZOS4"}  # fmt: skip


def by_pillow(image: np.ndarray, size: Size, mode: str) -> np.ndarray:
    from PIL import Image

    height, width = size
    resampling = getattr(Image.Resampling, mode.upper())
    return np.asarray(Image.fromarray(image).resize((width, height), resampling))


def by_opencv(image: np.ndarray, size: Size, mode: str) -> np.ndarray:
    cv2, (height, width) = opencv(), size
    flag = getattr(cv2, f"INTER_{OPENCV[mode]}")
    found: np.ndarray = cv2.resize(image, (width, height), interpolation=flag)
    return found


VARIANTS: dict[str, Callable[[np.ndarray, Size], np.ndarray]] = {
    **{f"pillow {mode}": partial(by_pillow, mode=mode) for mode in PILLOW},
    **{f"opencv {mode}": partial(by_opencv, mode=mode) for mode in OPENCV},
}
