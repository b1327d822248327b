"""An embedding table in integers: a row is unpacked and scaled when it is looked up."""

from typing import Any

import torch
from torch import Tensor, nn

from qtk.grids import Steps
from qtk.modules.stored import load, store, stored_shape
from qtk.scheme import Scheme


class QuantEmbedding(nn.Module):
    """N rows of K channels, one scale a row; the table stays in its stored form.

    Buffers (`state_dict`):
        weight: [N, width, 1] int8 or uint8, the stored codes.
        weight_scale: [N, 1] float32.
        weight_zero_point: [N, 1] int8, for asymmetric tables.

    It has the names of `QuantLinear` where the two mean the same: N are `out_features`, K are
    `in_features`.
    """

    weight: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    bias = None
    input_shift = None
    transform = rotation = False
    kernel = "gather, dequantize"

    def __init__(
        self, in_features: int, out_features: int, scheme: Scheme, *, dtype: torch.dtype,
        device: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        assert scheme.w is not None
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        code_dtype, width = stored_shape(in_features, scheme.w.bits)
        codes = torch.zeros(out_features, *width, dtype=code_dtype, device=device)
        self.register_buffer("weight", codes)
        scale = torch.zeros(out_features, 1, dtype=torch.float32, device=device)
        self.register_buffer("weight_scale", scale)
        zero_point = None if scheme.w.symmetric else torch.zeros_like(scale, dtype=torch.int8)
        self.register_buffer("weight_zero_point", zero_point)
        self.dtype = dtype  # of the rows that come out; follows .to(dtype)

    @classmethod
    def from_codes(cls, codes: Tensor, steps: Steps, dtype: torch.dtype) -> "QuantEmbedding":
        """Codes [N, K] int8 of one step a row -> a table that gives rows of `dtype`."""
        N, K = codes.shape
        table = cls(K, N, Scheme(steps.fmt, None), dtype=dtype, device=codes.device)
        table.weight = store(codes, steps.fmt.bits).contiguous()
        table.weight_scale = steps.scale.float().clone()
        if steps.zero_point is not None:
            table.weight_zero_point = steps.zero_point.to(torch.int8)
        return table

    def forward(self, ids: Tensor) -> Tensor:
        """[...] integers -> [..., K]."""
        assert self.scheme.w is not None
        rows = self.weight[ids.flatten()]  # [M, width, 1]
        codes = load(rows, self.scheme.w.bits, self.in_features)
        zero_point = self.weight_zero_point
        zero_point = None if zero_point is None else zero_point[ids.flatten()]
        steps = Steps(self.scheme.w, self.weight_scale[ids.flatten()], zero_point)
        return steps.dequantize(codes).view(*ids.shape, -1).to(self.dtype)

    def codes(self) -> Tensor:
        """[N, K] int8."""
        assert self.scheme.w is not None
        return load(self.weight, self.scheme.w.bits, self.in_features)

    def stored_weight(self) -> Tensor:
        return self.weight

    def prepare(self) -> None:
        """Nothing to do: the stored form is what runs."""

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantEmbedding":
        scale = self.weight_scale
        self.dtype = fn(scale.new_empty(0, dtype=self.dtype)).dtype
        super()._apply(fn, recurse)
        self.weight_scale = scale.to(self.weight_scale.device)  # scales stay float32
        return self

    def extra_repr(self) -> str:
        return f"{self.out_features}, {self.in_features}, {self.scheme.name}"
