"""Activation function, shift, scale and quantize in one pass.

    y        = activation(x) * multiplier + offset      per channel
    q, scale = codes of y                               see `_codes.py`

Behind the first linear layer of an MLP: the only pass over its output.

M tokens, K channels. The kernel is that of `shift_scale_quantize.py` with the activation in front.
"""

from torch import Tensor

from ._activation import activate, check_activation
from ._codes import Codes, Granularity, check_channels, quantize_ref
from ._dispatch import backend_of
from ._plan import shape_of
from .shift_scale_quantize import launch_shift_scale_quantize


def activation_quantize_ref(
    x: Tensor, multiplier: Tensor | None, offset: Tensor | None, activation: str, codes: Codes
) -> tuple[Tensor, Tensor | None]:
    """The definition, in float32."""
    y = activate(x.float(), activation)  # [..., K]
    if multiplier is not None:
        y *= multiplier.float()
    if offset is not None:
        y += offset.float()
    return quantize_ref(y, codes)


def activation_quantize(
    x: Tensor,
    multiplier: Tensor | None = None,
    offset: Tensor | None = None,
    *,
    activation: str,
    bits: int,
    granularity: Granularity = "tensor",
    signed: bool = True,
    packed: bool = False,
    clip: float = 1.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Quantizes activation(x) * multiplier + offset.

    Args:
        x: [..., K], float32, float16 or bfloat16.
        multiplier: [K], or None for 1.
        offset: [K], or None for 0.
        activation: "gelu" (error function), "gelu_tanh" or "relu".
        bits: 2 to 8.
        granularity: "tensor" (static), "token", or the size of a group of channels.
        signed: int8 codes, else uint8.
        packed: two 4-bit codes a byte, in the layout of `pack_int4`.
        clip: the part of the dynamic range to keep, in (0, 1].

    Returns:
        q: [..., K], int8 or uint8, or [..., ceil(K / 128) * 64], uint8, if packed.
        scale: None (static), or [..., 1] or [..., G], float32.
    """
    check_activation(activation)
    if backend_of(x, backend) == "triton" and x.numel():
        q, *scale = launch_shift_scale_quantize(
            x, multiplier, offset, activation, bits, str(granularity), signed, packed, clip
        )
        return q, scale[0] if scale else None
    check_channels(x.shape, multiplier=shape_of(multiplier), offset=shape_of(offset))
    codes = Codes(bits, granularity, signed, packed, clip)
    return activation_quantize_ref(x, multiplier, offset, activation, codes)
