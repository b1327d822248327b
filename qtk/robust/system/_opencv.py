"""OpenCV, when it is needed."""

from typing import Any

from qtk.errors import QtkError


def opencv() -> Any:
    """The module.

    Raises:
        QtkError: it is not installed.
    """
    try:
        import cv2
    except ImportError:
        raise QtkError("this noise needs OpenCV: pip install 'qtk-torch[robust]'") from None
    return cv2
