"""The linear layer of a quantized model: integer codes, scales, and nothing in floating point.

    x' = (x - input_shift) / input_channel_scale              (if it has a transform)
    x' = x' R                                                 (if it has a rotation)
    q  = codes of x'                                          static grid, or one scale a token
    y  = dequantize(sum_k q_k weight_k) + bias

The stored weight is what goes to disk: int8, packed int4, or dense bits for the other widths. Where
a kernel wants another layout, the stored form is released and restored when it is asked for.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qtk.hadamard import rotate
from qtk.modules.grid import InputGrid
from qtk.modules.plan import Plan, make_plan, multiply, restore_codes
from qtk.modules.stored import load, store, stored_shape
from qtk.numerics import expand_groups
from qtk.scheme import Scheme
from qtk_kernels.hadamard_quantize import hadamard_quantize
from qtk_kernels.shift_scale_quantize import shift_scale_quantize


class QuantLinear(nn.Module):
    """A linear layer on integers. N output channels, K input channels, G groups.

    Buffers (`state_dict`):
        weight: [N, width, 1] int8 or uint8, the stored codes.
        weight_scale: [N, G] float32, of either sign.
        weight_zero_point: [N, G] int8, for asymmetric weights.
        bias: [N] float32, optional.
        input_shift, input_channel_scale: [K] float32, with a transform only.
        input_scale: float32, input_zero_point: int32, scalars, for static activations.
        input_clip: float32 scalar, for dynamic activations.
    """

    weight: Tensor | None  # None while the plan's operand holds the codes
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    bias: Tensor | None
    input_shift: Tensor | None
    input_channel_scale: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    input_clip: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, scheme: Scheme, *, bias: bool = True,
        transform: bool = False, rotation: bool = False, backend: str = "auto", device: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        assert scheme.w is not None
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        self.transform, self.rotation, self.backend, self.w = transform, rotation, backend, scheme.w
        N, K, a = out_features, in_features, scheme.a
        groups = 1 if self.w.group_size is None else -(-K // self.w.group_size)
        dtype, width = stored_shape(K, self.w.bits)

        def buffer(
            name: str, present: bool, *shape: int, dtype: torch.dtype = torch.float32
        ) -> None:
            value = torch.zeros(shape, dtype=dtype, device=device) if present else None
            self.register_buffer(name, value)

        buffer("weight", True, N, *width, dtype=dtype)
        buffer("weight_scale", True, N, groups)
        buffer("weight_zero_point", not self.w.symmetric, N, groups, dtype=torch.int8)
        buffer("bias", bias, N)
        buffer("input_shift", transform, K)
        buffer("input_channel_scale", transform, K)
        static = a is not None and a.granularity == "tensor"
        buffer("input_scale", static)
        buffer("input_zero_point", static, dtype=torch.int32)
        buffer("input_clip", a is not None and not static)
        self._plan: Plan | None = None
        self._joined: tuple[Tensor, slice] | None = None

    @classmethod
    def from_codes(
        cls, codes: Tensor, weight_scale: Tensor, weight_zero_point: Tensor | None,
        bias: Tensor | None, grid: InputGrid, scheme: Scheme, backend: str = "auto",
    ) -> "QuantLinear":  # fmt: skip
        """A layer ready to run.

        Args:
            codes: [N, K] integers in the weight format's range.
            weight_scale: [N, G].
            weight_zero_point: [N, G] integers in that range, or None for 0.
            bias: [N], with the shift's share already in it.
            grid: how the input is quantized.
            scheme: the formats of weight and input.
            backend: "auto", "triton", "cpu" or "reference".
        """
        N, K = codes.shape
        layer = cls(
            K, N, scheme, bias=bias is not None, transform=grid.shift is not None,
            rotation=grid.rotation,
            backend=backend, device=codes.device,
        )  # fmt: skip
        layer.weight = store(codes.to(torch.int8), layer.w.bits)
        layer.weight_scale = _own(weight_scale)
        if weight_zero_point is not None:
            layer.weight_zero_point = weight_zero_point.to(torch.int8)
        if bias is not None:
            layer.bias = _own(bias)
        if grid.shift is not None and grid.channel_scale is not None:
            layer.input_shift = _own(grid.shift)
            layer.input_channel_scale = _own(grid.channel_scale)
        if grid.scale is not None and grid.zero_point is not None:
            layer.input_scale = _own(grid.scale).reshape(())
            layer.input_zero_point = _own(grid.zero_point).to(torch.int32).reshape(())
        if layer.input_clip is not None:
            layer.input_clip = torch.tensor(float(grid.clip), device=codes.device)
        layer.prepare()
        return layer

    # --- computing

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N] in x's dtype. Gradients pass straight through the rounding."""
        if torch.is_grad_enabled() and x.requires_grad:
            return _StraightThrough.apply(x, self)
        return self.multiply(*self.quantize(x), out_dtype=x.dtype)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """[..., K] -> codes [..., K] and their scale (None when static); floats stay floats."""
        plan = self.plan
        if self.rotation:
            assert plan.codes is not None
            multiplier, offset = plan.before or (None, None)
            return hadamard_quantize(
                x, multiplier, offset, plan.codes, out_multiplier=plan.multiplier,
                out_offset=plan.offset, backend=plan.backend,
            )  # fmt: skip
        if plan.codes is None:
            if plan.multiplier is not None and plan.offset is not None:
                x = (x.float() * plan.multiplier + plan.offset).to(x.dtype)
            return x, None
        return self.quantize_rotated(x)

    def quantize_rotated(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What `quantize` does behind the rotation, or all of it where there is none."""
        plan = self.plan
        assert plan.codes is not None
        return shift_scale_quantize(
            x, plan.multiplier, plan.offset, plan.codes, backend=plan.backend
        )

    def multiply(
        self, q: Tensor, scale: Tensor | None, out_dtype: torch.dtype = torch.float32,
        activation: str | None = None,
    ) -> Tensor:  # fmt: skip
        """What `quantize` gave -> [..., N], an activation applied to it if asked for."""
        if self.plan.operand is None:
            self.prepare()  # the joined operand is another layer's business now
        return multiply(q, scale, self.plan, out_dtype, activation)

    # --- the weight

    @property
    def plan(self) -> Plan:
        if self._plan is None:
            self.prepare()
        assert self._plan is not None
        return self._plan

    @property
    def kernel(self) -> str:
        """The name of what really computes."""
        return self.plan.kernel

    def codes(self) -> Tensor:
        """[N, K] int8."""
        K = self.in_features
        if self.weight is not None:
            return load(self.weight, self.w.bits, K)
        if self._joined is not None:
            operand, rows = self._joined
            return restore_codes(operand, self.w, K)[rows]
        assert self.plan.operand is not None
        return restore_codes(self.plan.operand, self.w, K)

    def dequantized_weight(self) -> Tensor:
        """[N, K] float32, the weight that multiplies x'. Made for the call."""
        codes, K, size = self.codes().float(), self.in_features, self.w.group_size
        if self.weight_zero_point is not None:
            codes = codes - expand_groups(self.weight_zero_point, K, size)
        return codes * expand_groups(self.weight_scale, K, size)

    @property
    def grid(self) -> InputGrid:
        """How the input becomes codes."""
        return InputGrid(
            self.scheme.a, self.input_shift, self.input_channel_scale, self.rotation,
            self.input_scale, self.input_zero_point,
            1.0 if self.input_clip is None else float(self.input_clip),
        )  # fmt: skip

    def stored_weight(self) -> Tensor:
        """The codes as they go to disk."""
        return self.weight if self.weight is not None else store(self.codes(), self.w.bits)

    def prepare(self) -> None:
        """Builds the plan for the device that the layer is on."""
        if self.weight is None:
            self.unprepare()
        if self.weight_scale.is_meta:
            return
        self._plan = make_plan(
            self.codes(), self.weight_scale, self.weight_zero_point, self.bias, self.grid, self.w,
            self.backend,
        )  # fmt: skip
        self.weight = None  # the operand gives the codes back

    def join(self, operand: Tensor, rows: slice) -> None:
        """Gives up the own operand for rows of one that several layers share, until it is needed.

        Args:
            operand: codes of several layers, in the layout of this layer's kernel.
            rows: which of its output channels are this layer's.
        """
        self._joined = operand, rows
        self._plan = replace(self.plan, operand=None)

    def unprepare(self) -> None:
        """Back to the stored form alone."""
        if self.weight is None:
            self.weight = self.stored_weight()
        self._plan = self._joined = None

    # --- moving, copying, saving

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantLinear":
        prepared = self._plan is not None
        self.unprepare()
        for name, value in self._buffers.items():
            if value is not None:  # scales stay float32 under .half() and .to(dtype)
                moved = fn(value)
                same = moved.dtype == value.dtype
                self._buffers[name] = moved if same else value.to(moved.device)
        if prepared:
            self.prepare()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.stored_weight()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        prepared = self._plan is not None
        self.unprepare()
        super()._load_from_state_dict(*args, **kwargs)
        if prepared:
            self.prepare()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_buffers"] = {**self._buffers, "weight": self.stored_weight()}
        state["_plan"] = state["_joined"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.prepare()

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.scheme.name}"


def _own(x: Tensor) -> Tensor:
    """A float32 copy: linears that share an input must not share tensors, or saving merges them."""
    return x.detach().float().clone().contiguous()


class _StraightThrough(torch.autograd.Function):
    """Integers forward; backward as if nothing had been rounded, zero where a grid clips."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantLinear) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        return layer.multiply(*layer.quantize(x), out_dtype=x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,), layer = ctx.saved_tensors, ctx.layer
        grad = grads[0].float() @ layer.dequantized_weight()
        if layer.input_scale is not None:
            q = torch.round(layer.grid.transformed(x) / layer.input_scale) + layer.input_zero_point
            grad = grad * ((q >= layer.scheme.a.qmin) & (q <= layer.scheme.a.qmax))
        if layer.rotation:
            grad = rotate(grad, inverse=True)
        if layer.input_channel_scale is not None:
            grad = grad / layer.input_channel_scale
        return grad.to(x.dtype), None
