"""Codes by packed int4 codes: Triton on a GPU, and the reference."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qtk.modules.products import NIBBLE, Emits, Operands, Product, output_of
from qtk_kernels.int4_linear import (
    int4_linear,
    int4_linear_kernel_name,
    prepare_int4,
    restore_int4,
)
from qtk_kernels.packing import pack_int4, packed_width, unpack_int4

PREFERENCE = 1


@dataclass(frozen=True)
class Int4(Product):
    """Holds two codes a byte, and reads inputs of four bits so too."""

    operand: Tensor
    scale: Tensor
    bias: Tensor | None
    offset: int
    in_features: int
    group_size: int | None
    packed: bool
    backend: str
    activation: str | None = None
    emits: Emits | None = None

    @property
    def packed_input(self) -> bool:
        return self.packed

    @property
    def name(self) -> str:
        name = int4_linear_kernel_name(
            self.operand, groups=self.scale.shape[1], backend=self.backend
        )
        return f"{name}, packed inputs" if self.packed else name

    def __call__(
        self, q: Tensor, scale: Tensor | None, out_dtype: torch.dtype = torch.float32
    ) -> Tensor:
        return int4_linear(
            q, self.operand, self.scale, self.bias, in_features=self.in_features,
            x_packed=self.packed, x_scale=scale, x_zero_point=self.offset,
            group_size=self.group_size, activation=self.activation, out_dtype=out_dtype,
            backend=self.backend, **output_of(self.emits),
        )  # fmt: skip

    def emitting(self, emits: Emits) -> "Int4":
        return replace(self, emits=emits)

    def codes(self) -> Tensor:
        return unpack_int4(restore_int4(self.operand, self.in_features), self.in_features)


def fits(operands: Operands, backend: str) -> bool:
    return operands.integers and operands.packs and backend != "cpu"


def prepare(operands: Operands, backend: str) -> Int4:
    K = operands.in_features
    operand = prepare_int4(pack_int4(operands.codes), K, backend)
    # short rows are padded to blocks when they are packed, and would grow
    narrow = operands.a is not None and operands.a.bits <= NIBBLE and packed_width(K) < K
    return Int4(
        operand, operands.scale, operands.bias, operands.offset, K, operands.w.group_size,
        narrow, backend,
    )  # fmt: skip
