"""The 19 corruptions of ImageNet-C (Hendrycks and Dietterich 2019, arXiv 1903.12261), computed by
the package imagecorruptions-imaug, whose constants are meant for images of 224 pixels."""

from typing import Any

import numpy as np

from qtk.errors import QtkError

NAMES = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur",
    "zoom_blur", "snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate",
    "jpeg_compression", "speckle_noise", "gaussian_blur", "spatter", "saturate",
)  # fmt: skip
SIDE = 96  # of the smallest image that they still mean something to
SEEDED = ("impulse_noise", "glass_blur")  # by an argument; the others draw from numpy's generator


def corrupt(name: str, image: np.ndarray, severity: int, seed: int) -> np.ndarray:
    """One image, corrupted.

    Raises:
        QtkError: the package is not installed.
    """
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        options: dict[str, Any] = {"seed": seed} if name in SEEDED else {}
        found: np.ndarray = _library().corrupt(
            image, severity=severity, corruption_name=name, **options
        )
    finally:
        np.random.set_state(state)
    return found


def _library() -> Any:
    try:
        import imagecorruptions
    except ImportError:
        raise QtkError(
            "corruptions need imagecorruptions-imaug and OpenCV: pip install 'qtk-torch[robust]'"
        ) from None
    return imagecorruptions
