"""Shift, scale and quantize activations in one pass.

    y        = x * multiplier + offset       per channel: SmoothQuant, Outlier Suppression+
    q, scale = codes of y                    see `_codes.py`

Reads x once and writes a byte (or half of one) per element; eager PyTorch makes eight passes.

M tokens, K channels. With a static step D and zero point p, a shift z and a channel scale s, the
caller passes multiplier = 1 / (s D) and offset = p - z / (s D).
"""

from torch import Tensor

from ._codes import Codes, Granularity, check_channels, quantize_ref
from ._dispatch import backend_of


def shift_scale_quantize_ref(
    x: Tensor, multiplier: Tensor | None, offset: Tensor | None, codes: Codes
) -> tuple[Tensor, Tensor | None]:
    """The definition, in float32: a multiplication, then an addition, each rounded."""
    y = x.float().clone() if multiplier is None else x.float() * multiplier.float()  # [..., K]
    if offset is not None:
        y += offset.float()
    return quantize_ref(y, codes)


def shift_scale_quantize(
    x: Tensor,
    multiplier: Tensor | None = None,
    offset: Tensor | None = None,
    *,
    bits: int,
    granularity: Granularity = "tensor",
    signed: bool = True,
    packed: bool = False,
    clip: float = 1.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Quantizes x * multiplier + offset.

    Args:
        x: [..., K], float32, float16 or bfloat16.
        multiplier: [K], or None for 1.
        offset: [K], or None for 0.
        bits: 2 to 8.
        granularity: "tensor" (static), "token", or the size of a group of channels.
        signed: int8 codes, else uint8.
        packed: two 4-bit codes a byte, in the layout of `pack_int4`.
        clip: the part of the dynamic range to keep, in (0, 1].

    Returns:
        q: [..., K], int8 or uint8, or [..., ceil(K / 128) * 64], uint8, if packed.
        scale: None (static), or [..., 1] or [..., G], float32.
    """
    check_channels(x, multiplier=multiplier, offset=offset)
    codes = Codes(bits, granularity, signed, packed, clip)
    backend_of(x, backend)
    return shift_scale_quantize_ref(x, multiplier, offset, codes)
