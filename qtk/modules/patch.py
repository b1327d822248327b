"""The patch embedding of vision transformers on integers: a convolution that strides by its size
is a linear layer on patches, and one dynamic scale per patch needs no calibration.
"""

from typing import Any

import torch
from torch import Tensor, nn

from qtk.modules.base import Quantized
from qtk.modules.linear import QuantLinear
from qtk.scheme import Scheme


class QuantPatchConv(Quantized):
    """Conv2d with kernel = stride. C channels, [kh, kw] pixels, N output channels."""

    REPLACES = nn.Conv2d

    def __init__(
        self, linear: QuantLinear, kernel_size: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.linear, self.kernel_size, self.dtype = linear, kernel_size, dtype
        self.scheme = linear.scheme

    @classmethod
    def fits(cls, module: nn.Module | None) -> bool:
        """Whether a module is a convolution that cuts an image into patches."""
        return (
            isinstance(module, nn.Conv2d)
            and module.kernel_size == module.stride
            and module.padding in ((0, 0), "valid")
            and module.groups == 1
            and module.dilation == (1, 1)
        )

    @classmethod
    def empty(
        cls, module: nn.Conv2d, scheme: Scheme, *, bias: bool, transform: bool, rotation: bool,
        backend: str,
    ) -> "QuantPatchConv":  # fmt: skip
        linear = QuantLinear(
            module.weight[0].numel(), module.out_channels, scheme, bias=bias, backend=backend,
            device=module.weight.device,
        )  # fmt: skip
        return cls(linear, module.kernel_size, module.weight.dtype)

    @property
    def kernel(self) -> str:  # type: ignore[override]
        return self.linear.kernel

    @property
    def weight(self) -> Tensor:
        """Nothing, in the dtype of the images that the layer reads: what transformers asks for."""
        return self.linear.weight_scale.new_empty(0, dtype=self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, height, width] -> [B, N, height / kh, width / kw]."""
        height, width = (n // k for n, k in zip(x.shape[2:], self.kernel_size, strict=True))
        patches = nn.functional.unfold(x, self.kernel_size, stride=self.kernel_size)
        y: Tensor = self.linear(patches.transpose(1, 2))  # [B, height * width / (kh kw), N]
        return y.transpose(1, 2).unflatten(-1, (height, width))

    def blank(self) -> "QuantPatchConv":
        return QuantPatchConv(self.linear.blank(), self.kernel_size, self.dtype)

    def dequantized(self) -> nn.Conv2d:
        linear, size = self.linear.dequantized(), self.kernel_size
        N, K = linear.weight.shape
        C = K // (size[0] * size[1])
        conv = nn.Conv2d(C, N, size, size, bias=linear.bias is not None, device="meta")  # type: ignore[arg-type]
        conv.weight = nn.Parameter(linear.weight.detach().view(N, C, *size).to(self.dtype))
        if linear.bias is not None:
            conv.bias = nn.Parameter(linear.bias.detach().to(self.dtype))
        return conv

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantPatchConv":
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        super()._apply(fn, recurse)
        return self


LAYER = QuantPatchConv
