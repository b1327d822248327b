"""How the input of a linear becomes what its product reads: change of variable, rotation, codes."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qtk.grids import Affine, Change, InputGrid
from qtk.scheme import Format
from qtk_kernels.activation import activate
from qtk_kernels.codes import Codes
from qtk_kernels.fp8_linear import to_fp8
from qtk_kernels.hadamard import rotate
from qtk_kernels.hadamard_quantize import hadamard_quantize
from qtk_kernels.shift_scale_quantize import shift_scale_quantize

Read = tuple[Tensor, Tensor | None]  # codes and the scale of dynamic ones, or floats and None


@dataclass(frozen=True)
class Reader:
    """x -> codes: before, rotation, after, rounding.

    Attributes:
        codes: what is written, None where floats stay floats or become e4m3.
        before: x * multiplier + offset before a rotation; [K] each, or None.
        rotation: whether there is one.
        after: the same after it, in units of codes where the grid is static. Without a rotation
            there is only this one.
        backend: of the kernels.
        uniform: step and zero point of a static grid without a change of variable before it.
        fp8: each token becomes e4m3, with a scale of its own.
    """

    codes: Codes | None
    before: Affine | None
    rotation: bool
    after: Affine | None
    backend: str
    uniform: tuple[float, int] | None = None
    fp8: bool = False

    @classmethod
    def of(cls, grid: InputGrid, K: int, backend: str) -> "Reader":
        """The reader of K channels on this grid.

        Args:
            backend: "triton", "cpu" or "reference".
        """
        fp8 = grid.fmt is not None and grid.fmt.kind == "e4m3"
        codes = None if fp8 or grid.fmt is None else codes_of(grid.fmt, grid.clip, backend)
        before, after = grid.affines(codes.offset if codes is not None and grid.static else 0)
        if after is not None:
            after = (after[0].expand(K).contiguous(), after[1].expand(K).contiguous())
        uniform = None
        if codes is not None and grid.static is not None and grid.change == Change():
            step, zero_point = grid.static
            uniform = float(step), int(zero_point) + codes.offset
        return cls(codes, before, grid.change.rotation, after, backend, uniform, fp8)

    @property
    def folded(self) -> Affine | None:
        """The affine map that a LayerNorm before it can do."""
        return self.before if self.rotation else self.after

    def __call__(self, x: Tensor, activation: str | None = None) -> Read:
        """[..., K] -> what the product reads of activation(x)."""
        if self.codes is None:
            x = self._floats(activate(x, activation))
            return to_fp8(x) if self.fp8 else (x, None)
        if self.rotation:
            multiplier, offset = self.before or (None, None)
            out_multiplier, out_offset = self.after or (None, None)
            return hadamard_quantize(
                activate(x, activation), multiplier, offset, self.codes,
                out_multiplier=out_multiplier, out_offset=out_offset, backend=self.backend,
            )  # fmt: skip
        multiplier, offset = self.after or (None, None)
        return shift_scale_quantize(
            x, multiplier, offset, self.codes, activation=activation, backend=self.backend
        )

    def rotated(self, x: Tensor) -> Read:
        """What `__call__` does after the rotation, or all of it where there is none."""
        if self.codes is None:
            return to_fp8(x)
        multiplier, offset = self.after or (None, None)
        return shift_scale_quantize(x, multiplier, offset, self.codes, backend=self.backend)

    def packed(self) -> "Reader":
        """The same, but two codes a byte."""
        assert self.codes is not None
        return replace(self, codes=replace(self.codes, packed=True))

    def _floats(self, x: Tensor) -> Tensor:
        if self.rotation:
            y = x.float() if self.before is None else x.float() * self.before[0] + self.before[1]
            return rotate(y).to(x.dtype)
        return x if self.after is None else (x.float() * self.after[0] + self.after[1]).to(x.dtype)

    def same_as(self, other: "Reader") -> bool:
        """Whether both read the same tensor as the same codes."""
        mine, its = (replace(reader, before=None, after=None) for reader in (self, other))
        pairs = ((self.before, other.before), (self.after, other.after))
        return mine == its and all(_equal(a, b) for a, b in pairs)


def codes_of(fmt: Format, clip: float, backend: str) -> Codes:
    """The codes of an input grid.

    On a CPU they are unsigned: without AMX oneDNN's fast kernels read nothing else.
    """
    offset = 2 ** (fmt.bits - 1) if backend == "cpu" else 0
    return Codes(fmt.bits, fmt.granularity, offset=offset, clip=clip)


def _equal(a: Affine | None, b: Affine | None) -> bool:
    if a is None or b is None:
        return a is b
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
