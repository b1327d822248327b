"""What multiplies: a linear's weight in the layout of the kernel that reads it. One file a kernel.

A product is made of operands once and called often. It carries the name of what it runs, so that
what a summary says cannot differ from what computes. The folder is the registry: of the files whose
`fits` accepts the operands, the one with the highest PREFERENCE serves.

    PREFERENCE: int
    def fits(operands: Operands, backend: str) -> bool
    def prepare(operands: Operands, backend: str) -> Product
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qtk.discover import available, load
from qtk.errors import BackendError
from qtk.scheme import Format
from qtk_kernels.codes import Codes

NIBBLE = 4  # weights of so many bits and fewer are packed, two codes a byte


@dataclass(frozen=True)
class Operands:
    """A weight [N, K] with all that is known before the tokens folded in. G groups.

    Attributes:
        codes: [N, K] int8.
        scale: [N, G] float32, times the input's step where that is static.
        bias: [N] float32 with the input's zero point in it, or None.
        w: the weight's grid.
        a: the input's grid, None for floats.
        zero_point: [N, G] float32 of the weight, or None.
        offset: what is subtracted from the codes of a dynamic input.
    """

    codes: Tensor
    scale: Tensor
    bias: Tensor | None
    w: Format
    a: Format | None
    zero_point: Tensor | None = None
    offset: int = 0

    @property
    def in_features(self) -> int:
        return self.codes.shape[1]

    @property
    def groups(self) -> int:
        return self.scale.shape[1]

    @property
    def integers(self) -> bool:
        """Whether inputs are integer codes."""
        return self.a is not None and self.a.kind == "int"

    @property
    def packs(self) -> bool:
        return self.w.bits <= NIBBLE

    @classmethod
    def joined(cls, parts: "list[Operands]") -> "Operands":
        """Operands of linears that read one input, their output channels one after the other."""
        biases = [
            part.scale.new_zeros(len(part.codes)) if part.bias is None else part.bias
            for part in parts
        ]
        zero_points = [part.zero_point for part in parts if part.zero_point is not None]
        return replace(
            parts[0],
            codes=torch.cat([part.codes for part in parts]),
            scale=torch.cat([part.scale for part in parts]),
            bias=torch.cat(biases),
            zero_point=torch.cat(zero_points) if zero_points else None,
        )


@dataclass(frozen=True)
class Emits:
    """Codes that a product writes in place of floats: round(y / step) + zero_point.

    Attributes:
        zero_point: with the codes' offset in it.
    """

    codes: Codes
    step: float
    zero_point: int


class Product(ABC):
    """activation(dequantize(q) @ weight + bias), ready to be called; a frozen dataclass."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Of what really runs."""

    @property
    def packed_input(self) -> bool:
        """Whether it reads two codes a byte."""
        return False

    @abstractmethod
    def __call__(
        self, q: Tensor, scale: Tensor | None, out_dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Codes [..., K] with the scale of dynamic ones, or floats with None -> [..., N]."""

    @abstractmethod
    def codes(self) -> Tensor:
        """[N, K] int8, exactly those it was made of."""

    def activated(self, activation: str) -> "Product":
        """The same with an activation after it; the operand is shared."""
        product: Product = replace(self, activation=activation)  # type: ignore[type-var]
        return product

    def emitting(self, emits: Emits) -> "Product | None":
        """The same, writing codes; None where its kernel writes floats alone."""
        return None

    def tensors(self) -> list[Tensor]:
        """What it holds."""
        held = (getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]
        return [value for value in held if isinstance(value, Tensor)]


def output_of(emits: Emits | None) -> dict[str, Any]:
    """What the kernels' linears call such codes."""
    if emits is None:
        return {}
    return {
        "out_codes": emits.codes, "out_step": emits.step, "out_zero_point": emits.zero_point,
    }  # fmt: skip


@cache
def _files() -> list[Any]:
    """Read once: a model has many layers, and some switch their bits."""
    return [load("modules.products", name) for name in available("modules.products")]


def product_of(operands: Operands, backend: str) -> Product:
    """The best product for these operands.

    Args:
        backend: "triton", "cpu" or "reference".

    Raises:
        BackendError: no file in qtk/modules/products fits.
    """
    fitting = [file for file in _files() if file.fits(operands, backend)]
    if not fitting:
        raise BackendError(
            f"no product on backend {backend!r} for weights on {operands.w} and inputs on "
            f"{operands.a}"
        )
    best: Any = max(fitting, key=lambda file: file.PREFERENCE)
    product: Product = best.prepare(operands, backend)
    return product
