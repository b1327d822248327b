"""JPEG decoders, whose inverse DCT and chroma upsampling differ."""

import io

import numpy as np

from qtk.robust.system._opencv import opencv

STAGE = "file"


def pillow(data: bytes) -> np.ndarray:
    """[H, W, 3] uint8, RGB."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as file:
        return np.asarray(file.convert("RGB"))


def by_opencv(data: bytes) -> np.ndarray:
    """[H, W, 3] uint8, RGB."""
    cv2 = opencv()
    found: np.ndarray = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    return found[..., ::-1]


VARIANTS = {"pillow": pillow, "opencv": by_opencv}
