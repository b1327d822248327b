"""The linear layer of a quantized model: integer codes, scales, and nothing in floating point.

    x' = (x - input_shift) / input_channel_scale              (if it has a transform)
    x' = x' R                                                 (if it has a rotation)
    q  = codes of x'                                          static grid, or one scale a token
    y  = dequantize(sum_k q_k weight_k) + bias

The stored weight is what goes to disk: int8, packed int4, or dense bits for the other widths. Where
a kernel wants another layout, the stored form is released and restored when it is asked for.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qtk.errors import BackendError
from qtk.hadamard import rotate
from qtk.numerics import dequantize, expand_groups, fake_quantize_token
from qtk.pack import dense
from qtk.scheme import Format, Scheme
from qtk_kernels._dispatch import backend_of
from qtk_kernels._int4 import pack_int4, unpack_int4
from qtk_kernels._int4_cpu import MOST_ROWS, FewRows, few_rows_linear, prepare_few_rows
from qtk_kernels._int8_cpu import onednn_linear
from qtk_kernels.hadamard_quantize import hadamard_quantize
from qtk_kernels.int4_linear import (
    int4_linear,
    int4_linear_kernel_name,
    prepare_int4,
    restore_int4,
)
from qtk_kernels.int8_linear import (
    fold_zero_point,
    int8_linear,
    int8_linear_kernel_name,
    prepare_int8,
    restore_int8,
)
from qtk_kernels.shift_scale_quantize import shift_scale_quantize
from qtk_kernels.weight_only_linear import (
    prepare_weight_only,
    weight_only_kernel_name,
    weight_only_linear,
)

Affine = tuple[Tensor, Tensor]  # multiplier [K] and offset [K]


@dataclass(frozen=True)
class InputGrid:
    """How a linear's input becomes codes.

    Attributes:
        fmt: the grid, None for inputs that stay floating point.
        shift, channel_scale: [K] float32, or None for no change of variable.
        rotation: whether a Hadamard rotation follows it.
        scale, zero_point: scalars of a static grid, None for others.
        clip: share of a token's maximum that a dynamic grid covers.
    """

    fmt: Format | None
    shift: Tensor | None = None
    channel_scale: Tensor | None = None
    rotation: bool = False
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    clip: float = 1.0

    def affines(self, lift: int = 0) -> tuple[Affine | None, Affine | None]:
        """The maps before and behind the rotation; the second ends in units of codes.

        Without a rotation there is only the second. `lift` is added to every code.
        """
        first = second = None
        if self.shift is not None and self.channel_scale is not None:
            first = (1 / self.channel_scale, -self.shift / self.channel_scale)
        if self.scale is not None and self.zero_point is not None:
            second = (1 / self.scale, self.zero_point.float() + lift)
        if self.rotation or first is None:
            return first, second
        if second is None:
            return None, first
        return None, (first[0] * second[0], first[1] * second[0] + second[1])

    def transformed(self, x: Tensor) -> Tensor:
        """[..., K] -> x' [..., K] float32, before rounding."""
        if self.shift is not None and self.channel_scale is not None:
            x = x.float() / self.channel_scale - self.shift / self.channel_scale
        return rotate(x.float()) if self.rotation else x.float()

    def fake_quantize(self, x: Tensor) -> Tensor:
        """x' on its grid, float32, with the very rounding that the kernels do."""
        if self.fmt is None:
            return self.transformed(x)
        if self.scale is None or self.zero_point is None:
            return fake_quantize_token(self.transformed(x), self.fmt.bits, self.clip)
        first, second = self.affines()
        y = x.float() if first is None else x.float() * first[0] + first[1]
        y = rotate(y) if self.rotation else y
        q = torch.round(y if second is None else y * second[0] + second[1])
        return dequantize(q.clamp(self.fmt.qmin, self.fmt.qmax), self.scale, self.zero_point)


@dataclass(frozen=True)
class Plan:
    """What a call needs, worked out once: folded vectors and the weight as its kernel reads it.

    Attributes:
        operand: the weight, in the kernel's layout; None while it is part of a joined one.
        before: x * multiplier + offset before the rotation, where there is one.
        multiplier, offset: [K] float32; q = round(x * multiplier + offset).
        weight_scale: [N, G], times the input's step when that is static.
        weight_zero_point: [N, G] float32, None for symmetric weights.
        bias: [N] with the input's zero point folded in.
        signed: codes are int8; else uint8, shifted by 2 ** (bits - 1).
        x_zero_point: what a dynamic kernel subtracts from a code.
        kernel: the name of what runs, for the summary.
        onednn: whether that is oneDNN, which needs none of the kernels' checks and choices.
        few_rows: four-bit weights once more, for a CPU's kernel for few tokens.
    """

    backend: str
    operand: Tensor | None
    before: Affine | None
    multiplier: Tensor | None
    offset: Tensor | None
    weight_scale: Tensor
    bias: Tensor | None
    signed: bool
    x_zero_point: int
    clip: float
    kernel: str
    onednn: bool = False
    few_rows: FewRows | None = None
    weight_zero_point: Tensor | None = None


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
        plan, a = self.plan, self.scheme.a
        if self.rotation:
            assert a is not None
            return hadamard_quantize(
                x, *(plan.before or (None, None)), out_multiplier=plan.multiplier,
                out_offset=plan.offset, bits=a.bits, granularity=a.granularity,
                signed=plan.signed, clip=plan.clip, backend=plan.backend,
            )  # fmt: skip
        if a is None:
            if plan.multiplier is not None and plan.offset is not None:
                x = (x.float() * plan.multiplier + plan.offset).to(x.dtype)
            return x, None
        return self.quantize_rotated(x)

    def quantize_rotated(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What `quantize` does behind the rotation, or all of it where there is none."""
        plan, a = self.plan, self.scheme.a
        assert a is not None
        return shift_scale_quantize(
            x, plan.multiplier, plan.offset, bits=a.bits, granularity=a.granularity,
            signed=plan.signed, clip=plan.clip, backend=plan.backend,
        )  # fmt: skip

    def multiply(
        self, q: Tensor, scale: Tensor | None, out_dtype: torch.dtype = torch.float32,
        activation: str | None = None,
    ) -> Tensor:  # fmt: skip
        """What `quantize` gave -> [..., N], an activation applied to it if asked for."""
        if self.plan.operand is None:
            self.prepare()  # the joined operand is another layer's business now
        plan = self.plan
        assert plan.operand is not None
        if self.scheme.a is None:
            assert activation is None
            if plan.few_rows is not None and q.shape[:-1].numel() <= MOST_ROWS:
                return few_rows_linear(q, plan.few_rows, plan.bias)
            return weight_only_linear(
                q, plan.operand, plan.weight_scale, plan.bias,
                w_zero_point=plan.weight_zero_point, bits=4 if self.is_int4 else 8,
                in_features=self.in_features, group_size=self.w.group_size, backend=plan.backend,
            )  # fmt: skip
        return linear_of_codes(
            q, scale, plan, self.is_int4, self.in_features, self.w.group_size, out_dtype, activation
        )

    # --- the weight

    @property
    def is_int4(self) -> bool:
        """Codes of four bits and less run in the packed int4 kernels, wider ones in int8's."""
        return self.w.bits <= 4

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
            return restore_codes(operand, self.is_int4, K)[rows]
        assert self.plan.operand is not None
        return restore_codes(self.plan.operand, self.is_int4, K)

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
        self._plan = make_plan(self, self.codes())
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


def linear_of_codes(
    q: Tensor, scale: Tensor | None, plan: Plan, is_int4: bool, in_features: int,
    group_size: int | None, out_dtype: torch.dtype, activation: str | None = None,
) -> Tensor:  # fmt: skip
    """Codes [..., K] times the plan's operand -> [..., N]."""
    assert plan.operand is not None
    if plan.onednn:
        return onednn_linear(
            q, plan.operand, plan.weight_scale, plan.bias, plan.x_zero_point, x_scale=scale,
            activation=activation, out_dtype=out_dtype,
        )  # fmt: skip
    if is_int4:
        return int4_linear(
            q, plan.operand, plan.weight_scale, plan.bias, in_features=in_features, x_scale=scale,
            x_zero_point=plan.x_zero_point, group_size=group_size, activation=activation,
            out_dtype=out_dtype, backend=plan.backend,
        )  # fmt: skip
    return int8_linear(
        q, plan.operand, plan.weight_scale, plan.bias, x_scale=scale,
        x_zero_point=plan.x_zero_point, group_size=group_size, activation=activation,
        out_dtype=out_dtype, backend=plan.backend,
    )  # fmt: skip


def resolve_backend(x: Tensor, backend: str) -> str:
    """What runs on x's device when `backend` is asked for.

    Raises:
        BackendError: there is no such backend, or it cannot run there.
    """
    try:
        return backend_of(x, backend)
    except ValueError as error:
        raise BackendError(f"{error}; backend='auto' chooses by device") from None


def make_plan(layer: QuantLinear, codes: Tensor) -> Plan:
    """Folds step, zero point, shift and channel scale into the vectors that the kernels read."""
    a, w, K, grid = layer.scheme.a, layer.w, layer.in_features, layer.grid
    backend = resolve_backend(layer.weight_scale, layer.backend)
    groups = layer.weight_scale.shape[1]
    if a is None:
        bits = 4 if layer.is_int4 else 8
        packed = pack_int4(codes) if layer.is_int4 else codes
        operand = prepare_weight_only(packed, bits=bits, in_features=K, backend=backend)
        name = weight_only_kernel_name(operand, bits=bits, backend=backend)
        w_zero_point = layer.weight_zero_point
        w_zero_point = None if w_zero_point is None else w_zero_point.float()
        few_rows = None
        if backend == "cpu" and layer.is_int4:
            few_rows = prepare_few_rows(codes, layer.weight_scale, w_zero_point, w.group_size)
        if few_rows is not None:
            name = f"aten int4 in bfloat16 up to {MOST_ROWS} tokens, else {name}"
        before, affine = grid.affines()
        multiplier, offset = affine or (None, None)
        return Plan(
            backend, operand, before, multiplier, offset, layer.weight_scale, layer.bias,
            signed=True, x_zero_point=0, clip=1.0, kernel=name, few_rows=few_rows,
            weight_zero_point=w_zero_point,
        )  # fmt: skip

    signed = backend != "cpu"
    lift = 0 if signed else 2 ** (a.bits - 1)  # signed code + lift = unsigned code
    before, affine = grid.affines(lift)
    multiplier, offset = affine or (None, None)
    weight_scale, bias, x_zero_point = layer.weight_scale, layer.bias, lift
    if layer.input_scale is not None and layer.input_zero_point is not None:
        weight_scale, x_zero_point = weight_scale * layer.input_scale, 0
        zero_point = int(layer.input_zero_point) + lift
        bias = fold_zero_point(bias, codes, weight_scale, 1.0, zero_point, w.group_size)
        assert multiplier is not None and offset is not None
        multiplier, offset = multiplier.expand(K).contiguous(), offset.expand(K).contiguous()
    operand, name = prepare_operand(codes, layer.is_int4, groups, backend)
    return Plan(
        backend, operand, before, multiplier, offset, weight_scale, bias, signed, x_zero_point,
        grid.clip, name, onednn=operand.is_mkldnn,
    )  # fmt: skip


def prepare_operand(codes: Tensor, is_int4: bool, groups: int, backend: str) -> tuple[Tensor, str]:
    """The codes in the layout of the kernel that will read them, and that kernel's name."""
    K = codes.shape[1]
    if backend == "cpu" and groups > 1:
        operand = codes.contiguous()  # oneDNN has one scale a row: groups run in float32 chunks
    elif is_int4:
        operand = prepare_int4(pack_int4(codes), K, backend)
    else:
        operand = prepare_int8(codes, backend)
    kernel_name = int4_linear_kernel_name if is_int4 else int8_linear_kernel_name
    return operand, kernel_name(operand, groups=groups, backend=backend)


def restore_codes(operand: Tensor, is_int4: bool, K: int) -> Tensor:
    """An integer kernel's operand -> codes [N, K] int8."""
    return unpack_int4(restore_int4(operand, K), K) if is_int4 else restore_int8(operand)


def stored_shape(K: int, bits: int) -> tuple[torch.dtype, tuple[int, int]]:
    """dtype and shape of one row of `store`'s result."""
    if bits == 8:
        return torch.int8, (K, 1)
    return torch.uint8, (-(-K // 128) * 64 if bits == 4 else -(-K * bits // 8), 1)


def store(codes: Tensor, bits: int) -> Tensor:
    """[N, K] int8 codes -> as they go to disk, [N, width, 1].

    The last axis tells codes from floats: a loader that does not know qtk fails on the shape
    instead of reading codes as weights.
    """
    if bits == 8:
        return codes[..., None]
    return (pack_int4(codes) if bits == 4 else dense.pack(codes, bits))[..., None]


def load(stored: Tensor, bits: int, K: int) -> Tensor:
    """Inverse of `store`."""
    rows = stored[..., 0]
    if bits == 8:
        return rows
    return unpack_int4(rows, K) if bits == 4 else dense.unpack(rows, bits, K)


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
