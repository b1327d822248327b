"""Values that describe a quantized layer: every stage reads them, nothing here knows a model.

Change       x' = ((x - shift) / channel_scale) R           what a transform finds
InputGrid    x' -> codes                                    what a range rule ends
Steps        codes -> w_hat                                 what a rounder chooses
LinearSpec   all of it, and the bias                        what a layer is, whoever runs it
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from qtk.errors import SchemeError
from qtk.numerics import dequantize, expand_groups, fake_quantize_fp8, fake_quantize_token
from qtk.scheme import Format, Scheme
from qtk_kernels.hadamard import rotate

Affine = tuple[Tensor, Tensor]  # multiplier [K] and offset [K], or scalars


@dataclass(frozen=True)
class Change:
    """x' = ((x - shift) / channel_scale) R  and  W' = (W * channel_scale) R,  b' = b + W @ shift

    so that x' W'^T + b' = x W^T + b, R being the orthogonal matrix of `qtk_kernels.hadamard`, or
    none.
    `Change()` changes nothing.

    Attributes:
        shift, channel_scale: [K] float32, both or neither.
        rotation: whether there is an R.
    """

    shift: Tensor | None = None
    channel_scale: Tensor | None = None
    rotation: bool = False

    def __post_init__(self) -> None:
        if (self.shift is None) != (self.channel_scale is None):
            raise SchemeError("a change of variable has both shift and channel_scale, or neither")

    def simplest(self) -> "Change":
        """The same without vectors that do nothing."""
        if self.shift is None or self.channel_scale is None:
            return self
        plain = (self.shift == 0).all() and (self.channel_scale == 1).all()
        return Change(rotation=self.rotation) if plain else self

    @property
    def affine(self) -> Affine | None:
        """x -> x * multiplier + offset, what stands before the rotation."""
        if self.shift is None or self.channel_scale is None:
            return None
        return 1 / self.channel_scale, -self.shift / self.channel_scale

    def inputs(self, x: Tensor) -> Tensor:
        """[..., K] -> x' [..., K], float32 at least."""
        x, affine = (x.float() if x.element_size() < 4 else x), self.affine
        if affine is not None:
            x = x * affine[0] + affine[1]
        return rotate(x) if self.rotation else x

    def weight(self, w: Tensor) -> Tensor:
        """[N, K] -> W' [N, K]."""
        if self.channel_scale is not None:
            w = w * self.channel_scale
        return rotate(w) if self.rotation else w

    def bias(self, w: Tensor, bias: Tensor | None) -> Tensor | None:
        """b' [N] of the weight [N, K] before the change; None where nothing is to be added."""
        if self.shift is None:
            return bias
        extra = w @ self.shift.to(w.dtype)
        return extra if bias is None else bias + extra


@dataclass(frozen=True)
class InputGrid:
    """How a linear's input becomes codes.

    Attributes:
        fmt: the grid, None for inputs that stay floating point.
        change: the change of variable before it.
        scale, zero_point: scalars of a static grid, None for others.
        clip: share of a token's maximum that a dynamic grid covers.
    """

    fmt: Format | None
    change: Change = Change()
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    clip: float = 1.0

    @property
    def static(self) -> Affine | None:
        """Scale and zero point, where both are known beforehand."""
        if self.scale is None or self.zero_point is None:
            return None
        return self.scale, self.zero_point

    def affines(self, offset: int = 0) -> tuple[Affine | None, Affine | None]:
        """The maps before and after the rotation; the second ends in units of codes.

        Without a rotation there is only the second. `offset` is added to every code.
        """
        first, second = self.change.affine, None
        if self.static is not None:
            second = (1 / self.static[0], self.static[1].float() + offset)
        if self.change.rotation or first is None:
            return first, second
        if second is None:
            return None, first
        return None, (first[0] * second[0], first[1] * second[0] + second[1])

    def fake_quantize(self, x: Tensor) -> Tensor:
        """x' on its grid, float32, with the very rounding that the kernels do."""
        if self.fmt is None:
            return self.change.inputs(x)
        if self.fmt.kind == "e4m3":
            return fake_quantize_fp8(self.change.inputs(x))
        if self.static is None:
            return fake_quantize_token(self.change.inputs(x), self.fmt.bits, self.clip)
        first, second = self.affines()
        y = x.float() if first is None else x.float() * first[0] + first[1]
        y = rotate(y) if self.change.rotation else y
        q = torch.round(y if second is None else y * second[0] + second[1])
        return dequantize(q.clamp(self.fmt.qmin, self.fmt.qmax), *self.static)


@dataclass(frozen=True)
class WeightGrid:
    """What each weight may become: level * scale, for the integer levels from lo to hi.

    A level is a code less its zero point.

    Attributes:
        scale, lo, hi: [N, K] float32, or some columns of that.
    """

    scale: Tensor
    lo: Tensor
    hi: Tensor

    def nearest(self, weight: Tensor) -> Tensor:
        """Levels of a weight of the same shape."""
        return self.clamp((weight / self.scale).round())

    def clamp(self, levels: Tensor) -> Tensor:
        return levels.clamp(self.lo, self.hi)

    def columns(self, which: Tensor | slice | int) -> "WeightGrid":
        return WeightGrid(self.scale[:, which], self.lo[:, which], self.hi[:, which])


@dataclass(frozen=True)
class Steps:
    """How the codes of one weight [N, K] are read: w_hat = (code - zero_point) * scale.

    Attributes:
        fmt: the grid.
        scale: [N, G] float32, G = 1 without groups. Without a zero point it has the sign that lays
            the longer side of the codes, down to -2**(bits - 1), on the longer side of the weights.
        zero_point: [N, G] holding integers, or None for 0.
    """

    fmt: Format
    scale: Tensor
    zero_point: Tensor | None = None

    def grid(self, K: int) -> WeightGrid:
        """For each weight."""
        offset = torch.zeros_like(self.scale) if self.zero_point is None else self.zero_point
        parts = (self.scale, self.fmt.qmin - offset, self.fmt.qmax - offset)
        return WeightGrid(*(self._expanded(part, K).expand(-1, K) for part in parts))

    def rows(self, which: slice) -> "Steps":
        """Those of some rows of the weight."""
        zero_point = None if self.zero_point is None else self.zero_point[which]
        return Steps(self.fmt, self.scale[which], zero_point)

    def codes(self, levels: Tensor) -> Tensor:
        """[N, K] levels -> codes."""
        if self.zero_point is None:
            return levels
        return levels + self._expanded(self.zero_point, levels.shape[1])

    def dequantize(self, codes: Tensor) -> Tensor:
        """[N, K] codes -> w_hat, float32."""
        K = codes.shape[1]
        if self.fmt.kind == "e4m3":
            codes = codes.to(torch.int8).view(torch.float8_e4m3fn)
        zero_point = 0 if self.zero_point is None else self._expanded(self.zero_point, K)
        return dequantize(codes, self._expanded(self.scale, K), zero_point)

    def _expanded(self, x: Tensor, K: int) -> Tensor:
        return expand_groups(x, K, self.fmt.group_size)


@dataclass(frozen=True)
class LinearSpec:
    """A quantized linear layer as a value: what an exporter, an audit or a search reads.

        y = x' w_hat^T + bias,   x' on `grid`,   w_hat = steps.dequantize(codes)

    Attributes:
        codes: [N, K] int8; the bytes of e4m3 weights.
        steps: of the weight.
        grid: of the input.
        bias: [N] float32 with the shift's share in it, or None.
    """

    codes: Tensor
    steps: Steps
    grid: InputGrid
    bias: Tensor | None

    @property
    def scheme(self) -> Scheme:
        return Scheme(self.steps.fmt, self.grid.fmt)

    def weight(self) -> Tensor:
        """[N, K] float32, the weight that multiplies x'. Made for the call."""
        return self.steps.dequantize(self.codes)

    def reference(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N] float32: the layer's definition, in floating point."""
        return F.linear(self.grid.fake_quantize(x), self.weight(), self.bias)

    def float_weight(self) -> Tensor:
        """[N, K] float32: the weight of the plain linear, before the change of variable."""
        weight, change = self.weight(), self.grid.change
        if change.rotation:
            weight = rotate(weight, inverse=True)
        return weight if change.channel_scale is None else weight / change.channel_scale

    def float_bias(self) -> Tensor | None:
        """[N] float32: the bias that goes with `float_weight`."""
        if self.grid.change.shift is None or self.bias is None:
            return self.bias
        return self.bias - self.float_weight() @ self.grid.change.shift
