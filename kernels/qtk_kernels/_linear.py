"""What the matrix products share: what they write, and checks of what all of them read."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .activation import activate, check_activation
from .codes import Codes


@dataclass(frozen=True)
class Output:
    """What an integer linear layer writes: activated floats, or codes of them; checks itself.

    Attributes:
        float_dtype: of a result that is not codes.
        codes: None, or with it the result is clamp(round(y / step) + zero_point).
        step, zero_point: the grid of those codes; an offset of theirs is part of the zero point.

    Raises:
        ValueError: an unknown activation, or codes that no step for all values gives.
    """

    activation: str | None = None
    float_dtype: torch.dtype = torch.float32
    codes: Codes | None = None
    step: float = 1.0
    zero_point: int = 0

    def __post_init__(self) -> None:
        check_activation(self.activation)
        if self.codes is None and (self.step, self.zero_point) != (1.0, 0):
            raise ValueError("out_step and out_zero_point go with out_codes, got None")
        if self.codes is not None and (not self.codes.static or self.codes.packed):
            raise ValueError(f"out_codes must be static and not packed, got {self.codes}")

    @property
    def dtype(self) -> torch.dtype:
        return self.float_dtype if self.codes is None else self.codes.dtype

    @cached_property
    def epilogue(self) -> dict[str, Any]:
        """Compile-time parameters of `store_linear`."""
        qmin, qmax = (0, 0) if self.codes is None else (self.codes.qmin, self.codes.qmax)
        return {"ACTIVATION": self.activation or "", "QMIN": qmin, "QMAX": qmax}

    def of(self, y: Tensor) -> Tensor:
        """The definition, from y in float32."""
        y = activate(y, self.activation)
        if self.codes is None:
            return y.to(self.float_dtype)
        q = torch.round(y / self.step) + self.zero_point
        return q.clamp_(self.codes.qmin, self.codes.qmax).to(self.dtype)


def empty_output(
    x: Tensor, N: int, activation: Any, float_dtype: torch.dtype, codes: Codes | None, *_: Any
) -> Tensor:
    """Uninitialized [..., N] of an `Output` of these fields."""
    return x.new_empty((*x.shape[:-1], N), dtype=codes.dtype if codes else float_dtype)


def check_sums(channels: int, zero_point: int) -> None:
    """Raises where an int32 sum of that many products of bytes could wrap around."""
    if channels * 128 * (128 + abs(zero_point)) >= 2**31:
        raise ValueError(
            f"sums over {channels} channels with zero point {zero_point} do not fit into int32: "
            "use groups, or backend='reference'"
        )


def check_scales(
    x: torch.Size, N: int, x_scale: torch.Size | None, bias: torch.Size | None
) -> None:
    """Raises unless there is one scale per token and group, and one bias per output channel."""
    if x_scale is not None and x_scale[:-1] != x[:-1]:
        raise ValueError(f"x_scale must be {[*x[:-1], 'G']}, got {list(x_scale)}")
    if bias is not None and bias != (N,):
        raise ValueError(f"bias must be [{N}], got {list(bias)}")
