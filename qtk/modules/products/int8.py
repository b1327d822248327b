"""Codes by int8 codes: Triton on a GPU, float32 chunks on a CPU without oneDNN's, the reference."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qtk.modules.products import Emits, Operands, Product, output_of
from qtk_kernels.int8_linear import int8_linear, int8_linear_kernel_name, prepare_int8, restore_int8

PREFERENCE = 0


@dataclass(frozen=True)
class Int8(Product):
    """Holds the codes as they are."""

    operand: Tensor
    scale: Tensor
    bias: Tensor | None
    offset: int
    group_size: int | None
    backend: str
    activation: str | None = None
    emits: Emits | None = None

    @property
    def name(self) -> str:
        return int8_linear_kernel_name(
            self.operand, groups=self.scale.shape[1], backend=self.backend
        )

    def __call__(
        self, q: Tensor, scale: Tensor | None, out_dtype: torch.dtype = torch.float32
    ) -> Tensor:
        return int8_linear(
            q, self.operand, self.scale, self.bias, x_scale=scale, x_zero_point=self.offset,
            group_size=self.group_size, activation=self.activation, out_dtype=out_dtype,
            backend=self.backend, **output_of(self.emits),
        )  # fmt: skip

    def emitting(self, emits: Emits) -> "Int8":
        return replace(self, emits=emits)

    def codes(self) -> Tensor:
        return restore_int8(self.operand)


def fits(operands: Operands, backend: str) -> bool:
    return operands.integers


def prepare(operands: Operands, backend: str) -> Int8:
    # grouped codes stay plain on a CPU: oneDNN's layout has one scale for each output channel
    plain = backend == "cpu" or operands.codes.numel() == 0
    operand = operands.codes.contiguous() if plain else prepare_int8(operands.codes, backend)
    return Int8(
        operand, operands.scale, operands.bias, operands.offset, operands.w.group_size, backend
    )
