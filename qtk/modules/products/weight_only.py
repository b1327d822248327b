"""Floats by codes, which are unpacked and scaled on the way: Triton, a CPU, and the reference."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qtk.modules.products import NIBBLE, Operands, Product
from qtk_kernels.activation import activate
from qtk_kernels.packing import pack_int4, unpack_int4
from qtk_kernels.weight_only_linear import (
    prepare_weight_only,
    restore_weight_only,
    weight_only_kernel_name,
    weight_only_linear,
)

PREFERENCE = 0


@dataclass(frozen=True)
class WeightOnly(Product):
    """Holds the codes, packed where they have four bits and fewer."""

    operand: Tensor
    scale: Tensor
    bias: Tensor | None
    zero_point: Tensor | None
    bits: int
    in_features: int
    group_size: int | None
    backend: str
    activation: str | None = None

    @property
    def name(self) -> str:
        return weight_only_kernel_name(self.operand, bits=self.bits, backend=self.backend)

    def __call__(
        self, q: Tensor, scale: Tensor | None, out_dtype: torch.dtype = torch.float32
    ) -> Tensor:
        y = weight_only_linear(
            q, self.operand, self.scale, self.bias, w_zero_point=self.zero_point, bits=self.bits,
            in_features=self.in_features, group_size=self.group_size, backend=self.backend,
        )  # fmt: skip
        return activate(y, self.activation)

    def codes(self) -> Tensor:
        K = self.in_features
        rows = restore_weight_only(self.operand, bits=self.bits, in_features=K)
        return unpack_int4(rows, K) if self.bits <= NIBBLE else rows


def fits(operands: Operands, backend: str) -> bool:
    return operands.a is None


def prepare(operands: Operands, backend: str) -> WeightOnly:
    K, bits = operands.in_features, NIBBLE if operands.packs else 8
    rows = pack_int4(operands.codes) if operands.packs else operands.codes
    operand = prepare_weight_only(rows, bits=bits, in_features=K, backend=backend)
    return WeightOnly(
        operand, operands.scale, operands.bias, operands.zero_point, bits, K,
        operands.w.group_size, backend,
    )  # fmt: skip
