"""oneDNN's int8 product, on CPUs where it is exact; weights of fewer bits are unpacked once."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qtk.modules.products import Emits, Operands, Product
from qtk_kernels.dispatch import cpu_has_int8
from qtk_kernels.int8_linear import prepare_int8, restore_int8
from qtk_kernels.onednn import NAMED, onednn_linear
from qtk_kernels.onednn import visible_to_compiler as visible_to_compiler

PREFERENCE = 2


def seven_bits_are_needed() -> bool:
    """Whether integer products are exact on this CPU if an operand has 7 bits, and not at W8A8."""
    return cpu_has_int8(7, 8) and not cpu_has_int8()


@dataclass(frozen=True)
class OneDnn(Product):
    """Holds the weight in oneDNN's blocked layout; one scale for each output channel."""

    operand: Tensor
    scale: Tensor
    bias: Tensor | None
    offset: int
    unpacked: bool
    static: bool
    activation: str | None = None
    emits: Emits | None = None

    @property
    def name(self) -> str:
        return f"onednn.qlinear_pointwise{' (unpacked)' if self.unpacked else ''}"

    def __call__(
        self, q: Tensor, scale: Tensor | None, out_dtype: torch.dtype = torch.float32
    ) -> Tensor:
        if self.emits is not None:
            return onednn_linear(
                q, self.operand, self.scale, self.bias, self.offset, activation=self.activation,
                out_dtype=self.emits.codes.dtype, out_step=self.emits.step,
                out_zero_point=self.emits.zero_point,
            )  # fmt: skip
        return onednn_linear(
            q, self.operand, self.scale, self.bias, self.offset, x_scale=scale,
            activation=self.activation, out_dtype=out_dtype,
        )  # fmt: skip

    def emitting(self, emits: Emits) -> "OneDnn | None":
        """Of static inputs, in 8 bits, after an activation that oneDNN's epilogue has."""
        fits = self.static and emits.codes.bits == 8 and self.activation in NAMED
        return replace(self, emits=emits) if fits else None

    def codes(self) -> Tensor:
        return restore_int8(self.operand)


def fits(operands: Operands, backend: str) -> bool:
    if backend != "cpu" or operands.a is None or not operands.integers:
        return False
    exact = cpu_has_int8(operands.w.bits, operands.a.bits)
    return exact and operands.groups == 1 and operands.codes.numel() > 0


def prepare(operands: Operands, backend: str) -> OneDnn:
    assert operands.a is not None
    w_bits, a_bits = operands.w.bits, operands.a.bits
    return OneDnn(
        prepare_int8(operands.codes, backend, w_bits=w_bits, a_bits=a_bits), operands.scale,
        operands.bias, operands.offset, operands.packs, operands.a.granularity == "tensor",
    )  # fmt: skip
