"""How a linear's input becomes codes: change of variable, rotation, grid."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qtk.hadamard import rotate
from qtk.numerics import dequantize, fake_quantize_token
from qtk.scheme import Format

Affine = tuple[Tensor, Tensor]  # multiplier [K] and offset [K]


@dataclass(frozen=True)
class InputGrid:
    """How a linear's input becomes codes.

    Attributes:
        fmt: the grid, None for inputs that stay floating point.
        shift, channel_scale: [K] float32, or None for no change of variable.
        rotation: whether a Hadamard rotation follows it.
        scale, zero_point: scalars of a static grid, None for others.
        clip: share of a token's maximum that a dynamic grid covers.
    """

    fmt: Format | None
    shift: Tensor | None = None
    channel_scale: Tensor | None = None
    rotation: bool = False
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    clip: float = 1.0

    def affines(self, code_offset: int = 0) -> tuple[Affine | None, Affine | None]:
        """The maps before and behind the rotation; the second ends in units of codes.

        Without a rotation there is only the second. `code_offset` is added to every code.
        """
        first = second = None
        if self.shift is not None and self.channel_scale is not None:
            first = (1 / self.channel_scale, -self.shift / self.channel_scale)
        if self.scale is not None and self.zero_point is not None:
            second = (1 / self.scale, self.zero_point.float() + code_offset)
        if self.rotation or first is None:
            return first, second
        if second is None:
            return None, first
        return None, (first[0] * second[0], first[1] * second[0] + second[1])

    def transformed(self, x: Tensor) -> Tensor:
        """[..., K] -> x' [..., K] float32, before rounding."""
        if self.shift is not None and self.channel_scale is not None:
            x = x.float() / self.channel_scale - self.shift / self.channel_scale
        return rotate(x.float()) if self.rotation else x.float()

    def fake_quantize(self, x: Tensor) -> Tensor:
        """x' on its grid, float32, with the very rounding that the kernels do."""
        if self.fmt is None:
            return self.transformed(x)
        if self.scale is None or self.zero_point is None:
            return fake_quantize_token(self.transformed(x), self.fmt.bits, self.clip)
        first, second = self.affines()
        y = x.float() if first is None else x.float() * first[0] + first[1]
        y = rotate(y) if self.rotation else y
        q = torch.round(y if second is None else y * second[0] + second[1])
        return dequantize(q.clamp(self.fmt.qmin, self.fmt.qmax), self.scale, self.zero_point)
