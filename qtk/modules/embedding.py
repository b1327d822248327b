"""An embedding table in integers: a row is unpacked and scaled when it is looked up."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qtk.grids import Steps
from qtk.modules.base import Quantized, buffer, own, refuse_floats
from qtk.modules.storage import load, store, stored_shape
from qtk.scheme import Scheme


class QuantEmbedding(Quantized):
    """N rows of K channels, G scales for each row; the table stays in its stored form.

    Buffers (`state_dict`):
        weight: [N, width, 1] int8 or uint8, the stored codes.
        weight_scale: [N, G] float32, G = 1 without groups.
        weight_zero_point: [N, G] int8, for asymmetric tables.

    It has the names of `QuantLinear` where the two mean the same: N are `out_features`, K are
    `in_features`.
    """

    REPLACES = nn.Embedding
    weight: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    kernel = "gather, dequantize"

    def __init__(
        self, in_features: int, out_features: int, scheme: Scheme, *, dtype: torch.dtype,
        device: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        assert scheme.w is not None
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        self.w = scheme.w
        code_dtype, width = stored_shape(in_features, scheme.w.bits)
        N, asymmetric = out_features, not scheme.w.symmetric
        G = 1 if self.w.group_size is None else -(-in_features // self.w.group_size)
        buffer(self, "weight", True, N, *width, device=device, dtype=code_dtype)
        buffer(self, "weight_scale", True, N, G, device=device)
        buffer(self, "weight_zero_point", asymmetric, N, G, device=device, dtype=torch.int8)
        self.dtype = dtype  # of the rows that come out; follows .to(dtype)

    @classmethod
    def from_codes(cls, codes: Tensor, steps: Steps, dtype: torch.dtype) -> "QuantEmbedding":
        """Codes [N, K] int8 and their steps -> a table that gives rows of `dtype`."""
        N, K = codes.shape
        table = cls(K, N, Scheme(steps.fmt, None), dtype=dtype, device=codes.device)
        table.weight = store(codes, steps.fmt.bits).contiguous()
        table.weight_scale = own(steps.scale)
        if steps.zero_point is not None:
            table.weight_zero_point = steps.zero_point.to(torch.int8, copy=True)
        return table

    @classmethod
    def empty(
        cls, module: nn.Embedding, scheme: Scheme, *, bias: bool, transform: bool,
        rotation: bool, backend: str,
    ) -> "QuantEmbedding":  # fmt: skip
        return cls(
            module.embedding_dim, module.num_embeddings, replace(scheme, a=None),
            dtype=module.weight.dtype, device=module.weight.device,
        )  # fmt: skip

    def forward(self, ids: Tensor) -> Tensor:
        """[...] integers -> [..., K]."""
        rows = ids.flatten()
        codes = load(self.weight[rows], self.w.bits, self.in_features)
        zero_point = None if self.weight_zero_point is None else self.weight_zero_point[rows]
        values = Steps(self.w, self.weight_scale[rows], zero_point).dequantize(codes)
        return values.view(*ids.shape, -1).to(self.dtype)

    def codes(self) -> Tensor:
        """[N, K] int8."""
        return load(self.weight, self.w.bits, self.in_features)

    def stored_weight(self) -> Tensor:
        return self.weight

    def blank(self) -> "QuantEmbedding":
        N, K = self.out_features, self.in_features
        return QuantEmbedding(K, N, self.scheme, dtype=self.dtype, device="meta")

    def dequantized(self) -> nn.Embedding:
        steps = Steps(self.w, self.weight_scale, self.weight_zero_point)
        weight = steps.dequantize(self.codes()).to(self.dtype)
        return nn.Embedding.from_pretrained(weight, freeze=False)

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantEmbedding":
        self.dtype = fn(self.weight_scale.new_empty(0, dtype=self.dtype)).dtype
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        refuse_floats(state_dict, prefix + "weight")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{self.out_features}, {self.in_features}, {self.scheme.name}"


LAYER = QuantEmbedding
