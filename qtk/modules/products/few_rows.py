"""Four-bit weights on a CPU: PyTorch's int4 kernel for few tokens, beside the product for many."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qtk.modules.products import Operands, Product, weight_only
from qtk.modules.products.weight_only import WeightOnly
from qtk_kernels.activation import activate
from qtk_kernels.few_rows import (
    MOST_ROWS,
    FewRows,
    few_rows_group,
    few_rows_linear,
    prepare_few_rows,
)

PREFERENCE = 1


@dataclass(frozen=True)
class FewOrMany(Product):
    """Chooses by the number of tokens; holds the weight twice."""

    few: FewRows
    many: WeightOnly

    @property
    def name(self) -> str:
        return f"aten int4 in bfloat16 up to {MOST_ROWS} tokens, else {self.many.name}"

    def __call__(
        self, q: Tensor, scale: Tensor | None, out_dtype: torch.dtype = torch.float32
    ) -> Tensor:
        if q.shape[:-1].numel() <= MOST_ROWS:
            return activate(few_rows_linear(q, self.few, self.many.bias), self.many.activation)
        return self.many(q, scale, out_dtype)

    def codes(self) -> Tensor:
        return self.many.codes()

    def activated(self, activation: str) -> "FewOrMany":
        return replace(self, many=replace(self.many, activation=activation))

    def tensors(self) -> list[Tensor]:
        return [*self.many.tensors(), self.few.packed, self.few.scales]


def fits(operands: Operands, backend: str) -> bool:
    return (
        operands.a is None and backend == "cpu" and operands.packs and _group(operands) is not None
    )


def prepare(operands: Operands, backend: str) -> FewOrMany:
    group = _group(operands)
    assert group is not None
    few = prepare_few_rows(operands.codes, operands.scale, operands.zero_point, group)
    return FewOrMany(few, weight_only.prepare(operands, backend))


def _group(operands: Operands) -> int | None:
    N, K = operands.codes.shape
    return few_rows_group((N, K), operands.scale.shape[1], operands.w.group_size)
