"""The patch embedding of vision transformers on integers: a convolution that strides by its size
is a linear layer on patches, and one dynamic scale a patch needs no calibration.
"""

from typing import Any

import torch
from torch import Tensor, nn

from qtk.modules.linear import QuantLinear


class QuantPatchConv(nn.Module):
    """Conv2d with kernel = stride. C channels, [kh, kw] pixels, N output channels."""

    def __init__(self, linear: QuantLinear, kernel_size: tuple[int, ...], dtype: torch.dtype):
        super().__init__()
        self.linear, self.kernel_size, self.dtype = linear, kernel_size, dtype

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

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantPatchConv":
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        super()._apply(fn, recurse)
        return self


def is_patch_conv(module: nn.Module | None) -> bool:
    """Whether a module is a convolution that cuts an image into patches."""
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == module.stride
        and module.padding in ((0, 0), "valid")
        and module.groups == 1
        and module.dilation == (1, 1)
    )
