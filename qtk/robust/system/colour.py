"""NV12, the format of video decoders: BT.601 luma a pixel, a pair of chroma for 2 x 2 of them.

Y = .256788 R + .504129 G + .097906 B + 16
U = -.148223 R - .290993 G + .439216 B + 128
V = .439216 R - .367788 G - .071427 B + 128                               all rounded

and back with C = Y - 16, D = U - 128, E = V - 128, exactly or by the usual integers.
"""

import numpy as np

STAGE = "image"
FORWARD = np.array([
    [0.256788, 0.504129, 0.097906], [-0.148223, -0.290993, 0.439216],
    [0.439216, -0.367788, -0.071427],
])  # fmt: skip
OFFSET = np.array([16.0, 128.0, 128.0])
BACK = np.array([
    [1.164383, 0.0, 1.596027], [1.164383, -0.391762, -0.812968], [1.164383, 2.017232, 0.0],
])  # fmt: skip
INTEGERS = np.array([[298, 0, 409], [298, -100, -208], [298, 516, 0]])


def rgb(image: np.ndarray) -> np.ndarray:
    return image


def nv12(image: np.ndarray) -> np.ndarray:
    """There and back, in floating point."""
    return _clipped(np.rint((_subsampled(image) - OFFSET) @ BACK.T))


def nv12_integers(image: np.ndarray) -> np.ndarray:
    """There, and back as (298 C + 409 E + 128) >> 8 and its like."""
    centred = (_subsampled(image) - OFFSET).astype(np.int64)
    return _clipped((centred @ INTEGERS.T + 128) >> 8)


def _subsampled(image: np.ndarray) -> np.ndarray:
    """Y, U and V [H, W, 3], U and V the means of 2 x 2 pixels."""
    yuv = np.rint(image.astype(np.float64) @ FORWARD.T + OFFSET)
    H, W, _ = image.shape
    chroma = np.pad(yuv[..., 1:], ((0, H % 2), (0, W % 2), (0, 0)), mode="edge")
    means = np.rint(chroma.reshape(-(-H // 2), 2, -(-W // 2), 2, 2).mean((1, 3)))
    yuv[..., 1:] = means.repeat(2, 0).repeat(2, 1)[:H, :W]
    return yuv


def _clipped(image: np.ndarray) -> np.ndarray:
    return image.clip(0, 255).astype(np.uint8)


VARIANTS = {"rgb": rgb, "nv12": nv12, "nv12 integers": nv12_integers}
