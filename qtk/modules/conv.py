"""A convolution on integers: a linear layer on its windows.

Where the input's grid is static, pixels become codes once, and windows are cut from the codes. A
window's pixels lie channels last in memory, so a weight's columns are brought into that order. A
dynamic grid is each window's own. A grouped convolution is no single matrix product: it computes in
floating point, with the weights that its codes stand for.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qtk.grids import Change, LinearSpec
from qtk.modules.base import Quantized, resolve_backend
from qtk.modules.linear import QuantLinear
from qtk.modules.products import Operands
from qtk.modules.reader import Reader
from qtk.scheme import Scheme
from qtk.windows import Windows


class WindowLinear(QuantLinear):
    """The linear layer of a convolution; its codes are stored in the order of a flattened weight.

    Attributes:
        pixels: kh * kw.
    """

    pixels: int = 1

    def like(self, spec: LinearSpec) -> "WindowLinear":
        found = WindowLinear.from_spec(spec, self.backend)
        found.unprepare()
        found.pixels = self.pixels
        found.prepare()
        return found

    @property
    def reads_pixels(self) -> bool:
        """Whether codes are made of pixels, before windows are cut; not where they are packed."""
        reader = self.reader
        return self._last is not None and reader.codes is not None and not reader.codes.packed

    @property
    def _last(self) -> Tensor | None:
        """[K], the columns channels last; None where they stay as they are."""
        grid = self.grid
        if grid.static is None or grid.change != Change() or self.w.group_size is not None:
            return None
        columns = torch.arange(self.in_features, device=self.weight_scale.device)
        return columns.view(-1, self.pixels).T.flatten()

    def operands(self, codes: Tensor | None = None) -> Operands:
        found, last = super().operands(codes), self._last
        return found if last is None else replace(found, codes=found.codes[:, last].contiguous())

    def codes(self) -> Tensor:
        if self.weight is not None or self._last is None:
            return super().codes()
        return super().codes()[:, self._last.argsort()]

    def run(self, x: Tensor) -> Tensor:
        return super().run(x if self._last is None else x[..., self._last])

    def pixel_reader(self, channels: int) -> Reader:
        """What turns pixels into codes."""
        backend = resolve_backend(self.weight_scale, self.backend)
        return Reader.of(self.grid, channels, backend)

    def blank(self) -> "WindowLinear":
        return WindowLinear(
            self.in_features, self.out_features, self.scheme, bias=self.bias is not None,
            device="meta",
        )  # fmt: skip


class QuantConv2d(Quantized):
    """Conv2d. B images, C channels, [kh, kw] pixels, N output channels, K = C kh kw / groups."""

    REPLACES = nn.Conv2d

    def __init__(self, linear: WindowLinear, windows: Windows, dtype: torch.dtype) -> None:
        super().__init__()
        linear.unprepare()
        linear.pixels = windows.kernel[0] * windows.kernel[1]
        self.linear: nn.Module = linear
        self.windows, self.dtype = windows, dtype
        self.scheme = linear.scheme

    @classmethod
    def from_spec(cls, spec: LinearSpec, conv: nn.Conv2d, backend: str) -> "QuantConv2d":
        """In the place of a float convolution; `spec` is of its weight [N, K]."""
        linear = WindowLinear.from_spec(spec, backend)
        layer = cls(linear, Windows.of(conv), conv.weight.dtype)
        layer.inner.prepare()
        return layer

    @classmethod
    def empty(
        cls, module: nn.Conv2d, scheme: Scheme, *, bias: bool, transform: bool, rotation: bool,
        backend: str,
    ) -> "QuantConv2d":  # fmt: skip
        linear = WindowLinear(
            module.weight[0].numel(), module.out_channels, scheme, bias=bias, backend=backend,
            device=module.weight.device,
        )  # fmt: skip
        return cls(linear, Windows.of(module), module.weight.dtype)

    @property
    def inner(self) -> WindowLinear:
        """Its linear layer, while that is not being learned."""
        assert isinstance(self.linear, WindowLinear)
        return self.linear

    @property
    def kernel(self) -> str:  # type: ignore[override]
        if self.windows.groups > 1:
            return f"torch conv2d (grouped, {str(self.dtype).removeprefix('torch.')})"
        return f"im2col, {self.inner.kernel}"

    @property
    def weight(self) -> Tensor:
        """Nothing, in the dtype of the images that the layer reads: what transformers asks for."""
        scale: Tensor = self.inner.weight_scale
        return scale.new_empty(0, dtype=self.dtype)

    @property
    def kernel_size(self) -> tuple[int, int]:
        """With `stride` and `dilation` what MobileNet asks for, which pads images itself."""
        return self.windows.kernel

    @property
    def stride(self) -> tuple[int, int]:
        return self.windows.stride

    @property
    def dilation(self) -> tuple[int, int]:
        return self.windows.dilation

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, height, width] -> [B, N, height', width'], laid out as x is."""
        if self.windows.groups > 1:
            return self._grouped(x)
        differentiated = torch.is_grad_enabled() and x.requires_grad
        if isinstance(self.linear, WindowLinear) and not differentiated and self.inner.reads_pixels:
            y = self._of_pixels(x)
        else:
            found = self.windows.of_pixels(self.windows.padded(x).permute(0, 2, 3, 1))
            y = self.linear(found.flatten(3))
        y = y.permute(0, 3, 1, 2)
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        return y if last else y.contiguous()

    def _of_pixels(self, x: Tensor) -> Tensor:
        """[B, height', width', N]; a sample that holds nan gives nan."""
        pixels = self.windows.padded(x).permute(0, 2, 3, 1).contiguous()
        q, _ = self.inner.pixel_reader(pixels.shape[-1])(pixels)
        rows = self.windows.of_pixels(q).movedim(3, 5).flatten(3)  # [B, height', width', K]
        y = self.inner.product(rows, None, out_dtype=x.dtype)
        return y + (x.flatten(1).sum(1, dtype=torch.float32) * 0).to(y.dtype)[:, None, None, None]

    def _grouped(self, x: Tensor) -> Tensor:
        conv, spec = self.windows, self.inner.spec()
        weight = spec.steps.dequantize(spec.codes).unflatten(1, (-1, *conv.kernel)).to(x.dtype)
        bias = None if spec.bias is None else spec.bias.to(x.dtype)
        return F.conv2d(
            conv.padded(x), weight, bias, conv.stride, 0, conv.dilation, conv.groups
        )  # fmt: skip

    def blank(self) -> "QuantConv2d":
        return QuantConv2d(self.inner.blank(), self.windows, self.dtype)

    def dequantized(self) -> nn.Conv2d:
        linear, at = self.inner.dequantized(), self.windows
        mode: Any = "zeros" if at.mode == "constant" else at.mode
        left, right, top, _ = at.padding
        weight = linear.weight.detach().unflatten(1, (-1, *at.kernel)).to(self.dtype)
        conv = nn.Conv2d(
            weight.shape[1] * at.groups, len(weight), at.kernel, at.stride,
            (top, left) if left == right else "same", at.dilation, at.groups,
            linear.bias is not None, mode, "meta",
        )  # fmt: skip
        conv.weight = nn.Parameter(weight)
        if linear.bias is not None:
            conv.bias = nn.Parameter(linear.bias.detach().to(self.dtype))
        return conv

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantConv2d":
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        super()._apply(fn, recurse)
        return self


LAYER = QuantConv2d
