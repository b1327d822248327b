"""The linear layer of a quantized model: integer codes, scales, and nothing in floating point.

    x' = (x - input_shift) / input_channel_scale              (if it has a transform)
    x' = x' R                                                 (if it has a rotation)
    q  = codes of x'                                          static grid, or one scale per token
    y  = dequantize(sum_k q_k weight_k) + bias

The stored weight is what goes to disk: int8, packed int4, or dense bits for the other widths. A
reader turns x into q, a product q into y; where the product wants another layout of the weight, the
stored form is released, and restored when it is asked for.
"""

from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from qtk.grids import Change, InputGrid, LinearSpec, Steps
from qtk.modules.base import Quantized, buffer, own, refuse_floats, resolve_backend
from qtk.modules.products import Operands, Product, product_of
from qtk.modules.reader import Read, Reader
from qtk.modules.storage import load, store, stored_shape
from qtk.scheme import Scheme
from qtk_kernels.hadamard import rotate
from qtk_kernels.int8_linear import fold_zero_point


@dataclass(frozen=True)
class Runtime:
    """What a prepared layer runs.

    Attributes:
        product: None while the weight is part of one that several layers share.
        shared, rows: that one, and which of its output channels are this layer's.
    """

    reader: Reader
    product: Product | None
    shared: Product | None = None
    rows: slice | None = None


Snapshot = tuple[Scheme, tuple[Tensor | None, Tensor, Tensor | None, Tensor | None], Runtime | None]


class QuantLinear(Quantized):
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

    REPLACES = nn.Linear
    weight: Tensor | None  # None while a product holds the codes
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
        static = a is not None and a.granularity == "tensor"
        shapes: dict[str, tuple[bool, tuple[int, ...], torch.dtype]] = {
            "weight": (True, (N, *width), dtype),
            "weight_scale": (True, (N, groups), torch.float32),
            "weight_zero_point": (not self.w.symmetric, (N, groups), torch.int8),
            "bias": (bias, (N,), torch.float32),
            "input_shift": (transform, (K,), torch.float32),
            "input_channel_scale": (transform, (K,), torch.float32),
            "input_scale": (static, (), torch.float32),
            "input_zero_point": (static, (), torch.int32),
            "input_clip": (a is not None and not static, (), torch.float32),
        }
        for name, (present, shape, dtype) in shapes.items():
            buffer(self, name, present, *shape, device=device, dtype=dtype)
        self._runtime: Runtime | None = None

    @classmethod
    def from_spec(cls, spec: LinearSpec, backend: str = "auto") -> Self:
        """A layer ready to run on its tensors' device.

        Args:
            spec: what it computes; its tensors are copied.
            backend: "auto", "triton", "cpu" or "reference".
        """
        (N, K), steps, grid, change = spec.codes.shape, spec.steps, spec.grid, spec.grid.change
        layer = cls(
            K, N, spec.scheme, bias=spec.bias is not None, transform=change.shift is not None,
            rotation=change.rotation, backend=backend, device=spec.codes.device,
        )  # fmt: skip
        layer.weight = store(spec.codes, layer.w.bits)
        layer.weight_scale = own(steps.scale)
        if steps.zero_point is not None:
            layer.weight_zero_point = steps.zero_point.to(torch.int8, copy=True)
        if spec.bias is not None:
            layer.bias = own(spec.bias)
        if change.shift is not None and change.channel_scale is not None:
            layer.input_shift = own(change.shift)
            layer.input_channel_scale = own(change.channel_scale)
        if grid.static is not None:
            scale, zero_point = grid.static
            layer.input_scale = own(scale).reshape(())
            layer.input_zero_point = own(zero_point).to(torch.int32).reshape(())
        if layer.input_clip is not None:
            layer.input_clip = torch.tensor(float(grid.clip), device=spec.codes.device)
        layer.prepare()
        return layer

    def like(self, spec: LinearSpec) -> "QuantLinear":
        """A layer of this kind that computes something else."""
        return QuantLinear.from_spec(spec, self.backend)

    @classmethod
    def empty(
        cls, module: nn.Linear, scheme: Scheme, *, bias: bool, transform: bool, rotation: bool,
        backend: str,
    ) -> "QuantLinear":  # fmt: skip
        return cls(
            module.in_features, module.out_features, scheme, bias=bias, transform=transform,
            rotation=rotation, backend=backend, device=module.weight.device,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N] in x's dtype. Gradients pass straight through the rounding.

        A token that holds nan or infinity gives nan, though its codes would be finite.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            y: Tensor = _StraightThrough.apply(x, self)
            return y
        return self.run(x)

    def run(self, x: Tensor) -> Tensor:
        """`forward` without gradients."""
        y = self.product(*self.reader(x), out_dtype=x.dtype)
        static = self.scheme.a is not None and self.scheme.a.granularity == "tensor"
        return y + (x.sum(-1, keepdim=True, dtype=torch.float32) * 0).to(y.dtype) if static else y

    def quantize(self, x: Tensor) -> Read:
        """[..., K] -> codes [..., K] and their scale (None when static); floats stay floats."""
        return self.reader(x)

    @property
    def reader(self) -> Reader:
        """What turns x into the product's operand."""
        return self._ready().reader

    @property
    def product(self) -> Product:
        """What multiplies."""
        product = self._ready().product
        if product is None:  # it was another layer's business; now it is this layer's too
            self.prepare()
            product = self._ready().product
        assert product is not None
        return product

    @property
    def kernel(self) -> str:  # type: ignore[override]
        runtime = self._ready()
        product = runtime.product or runtime.shared
        assert product is not None
        return product.name

    @property
    def grid(self) -> InputGrid:
        """How the input becomes codes."""
        change = Change(self.input_shift, self.input_channel_scale, self.rotation)
        clip = 1.0 if self.input_clip is None else float(self.input_clip)
        return InputGrid(self.scheme.a, change, self.input_scale, self.input_zero_point, clip)

    @property
    def steps(self) -> Steps:
        """How the codes become the weight."""
        return Steps(self.w, self.weight_scale, self.weight_zero_point)

    def spec(self) -> LinearSpec:
        """The layer as a value."""
        return LinearSpec(self.codes(), self.steps, self.grid, self.bias)

    def become(self, spec: LinearSpec) -> None:
        """Takes the codes, steps and input grid of another spec, such as one of fewer bits.

        Args:
            spec: of the same shapes and granularities, with the same change of variable.
        """
        self._runtime = None
        assert spec.scheme.w is not None
        self.scheme, self.w = spec.scheme, spec.scheme.w
        self.weight_scale = own(spec.steps.scale)
        if spec.grid.static is not None:
            scale, zero_point = spec.grid.static
            self.input_scale = own(scale).reshape(())
            self.input_zero_point = own(zero_point).to(torch.int32).reshape(())
        self._run_with(spec.codes)

    def snapshot(self) -> Snapshot:
        """What `become` changes, prepared as it is, for `restore`."""
        buffers = (self.weight, self.weight_scale, self.input_scale, self.input_zero_point)
        return self.scheme, buffers, self._runtime

    def restore(self, found: Snapshot) -> None:
        """The layer as it was: nothing is prepared anew."""
        self.scheme, buffers, self._runtime = found
        assert self.scheme.w is not None
        self.w = self.scheme.w
        self.weight, self.weight_scale, self.input_scale, self.input_zero_point = buffers

    def codes(self) -> Tensor:
        """[N, K] int8."""
        if self.weight is not None:
            return load(self.weight, self.w.bits, self.in_features)
        runtime = self._ready()
        if runtime.product is not None:
            return runtime.product.codes()
        assert runtime.shared is not None and runtime.rows is not None
        return runtime.shared.codes()[runtime.rows]

    def stored_weight(self) -> Tensor:
        """The codes as they go to disk."""
        return self.weight if self.weight is not None else store(self.codes(), self.w.bits)

    def tensors(self) -> list[Tensor]:
        """What it holds; what it shares with other layers is theirs."""
        product = None if self._runtime is None else self._runtime.product
        return [*self.buffers(recurse=False), *([] if product is None else product.tensors())]

    def operands(self, codes: Tensor | None = None) -> Operands:
        """Step, zero point, shift and channel scale folded into what a product reads.

        Args:
            codes: [N, K] int8, where they are at hand.
        """
        codes = self.codes() if codes is None else codes
        scale, bias, static = self.weight_scale, self.bias, self.grid.static
        offset = 0 if self.reader.codes is None else self.reader.codes.offset
        if static is not None:
            scale, zero_point = scale * static[0], int(static[1]) + offset
            bias = fold_zero_point(bias, codes, scale, 1.0, zero_point, self.w.group_size)
            offset = 0
        zeros = None if self.weight_zero_point is None else self.weight_zero_point.float()
        return Operands(codes, scale, bias, self.w, self.scheme.a, zeros, offset)

    def prepare(self) -> None:
        """Builds reader and product for the device that the layer is on."""
        self.unprepare()
        if not self.weight_scale.is_meta:
            self._run_with(self.codes())

    def _run_with(self, codes: Tensor) -> None:
        backend = resolve_backend(self.weight_scale, self.backend)
        self._runtime = Runtime(Reader.of(self.grid, self.in_features, backend), None)
        product = product_of(self.operands(codes), backend)
        reader = self._runtime.reader.packed() if product.packed_input else self._runtime.reader
        self._runtime = Runtime(reader, product)
        self.weight = None  # the product gives the codes back

    def share(self, product: Product, rows: slice) -> None:
        """Gives up the own product for rows of one that several layers share, until it is called.

        Args:
            product: of several layers, with this layer's codes among its own.
            rows: which of its output channels are this layer's.
        """
        self._runtime = replace(self._ready(), product=None, shared=product, rows=rows)

    def unprepare(self) -> None:
        if self.weight is None:
            self.weight = self.stored_weight()
        self._runtime = None

    @property
    def is_prepared(self) -> bool:
        return self._runtime is not None

    def _ready(self) -> Runtime:
        if self._runtime is None:
            self.prepare()
        assert self._runtime is not None, "a layer on the meta device does not run"
        return self._runtime

    def blank(self) -> "QuantLinear":
        return QuantLinear(
            self.in_features, self.out_features, self.scheme, bias=self.bias is not None,
            transform=self.transform, device="meta",
        )  # fmt: skip

    def dequantized(self) -> nn.Linear:
        spec = self.spec()
        bias = spec.float_bias()
        K, N, device = self.in_features, self.out_features, spec.codes.device
        linear = nn.Linear(K, N, bias is not None, device=device)
        linear.weight = nn.Parameter(spec.float_weight())
        if bias is not None:
            linear.bias = nn.Parameter(bias.clone())
        return linear

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.stored_weight()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        refuse_floats(state_dict, prefix + "weight")
        prepared = self.is_prepared
        self.unprepare()
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prepared:
            self.prepare()

    def __getstate__(self) -> dict[str, Any]:
        # bytes, not a tensor: one made for the call dies before another process has opened it
        stored = self.stored_weight().cpu().numpy()
        buffers = {**self._buffers, "weight": None}
        return {**self.__dict__, "_buffers": buffers, "_runtime": None, "_stored": stored}

    def __setstate__(self, state: dict[str, Any]) -> None:
        stored = state.pop("_stored")
        super().__setstate__(state)
        self.weight = torch.from_numpy(stored).to(self.weight_scale.device)
        self.prepare()

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.scheme.name}"


class _StraightThrough(torch.autograd.Function):
    """Integers forward; backward as if nothing had been rounded, zero where a grid clips."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantLinear) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer, ctx.spec = layer, layer.spec()  # the layer may have other bits by then
        return layer.run(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,), layer, spec = ctx.saved_tensors, ctx.layer, ctx.spec
        grad, static, fmt = grads[0].float() @ spec.weight(), spec.grid.static, spec.grid.fmt
        if static is not None:
            q = torch.round(spec.grid.change.inputs(x) / static[0]) + static[1]
            grad = grad * ((q >= fmt.qmin) & (q <= fmt.qmax))
        if layer.rotation:
            grad = rotate(grad, inverse=True)
        if layer.input_channel_scale is not None:
            grad = grad / layer.input_channel_scale
        return grad.to(x.dtype), None


LAYER = QuantLinear
