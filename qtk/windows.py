"""A convolution as a matrix product: the windows that it reads, each a row of K = C kh kw numbers.

Rows are in the order of a flattened weight [N, C, kh, kw]: channel by channel, pixels inside.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Windows:
    """Where a convolution's windows lie.

    Attributes:
        kernel, stride, dilation: (height, width), in pixels.
        padding: left, right, top, bottom, in pixels.
        groups: into which the channels fall, each convolved with filters of its own.
        mode: what padding is filled with, as `torch.nn.functional.pad` calls it.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int, int, int]
    groups: int = 1
    mode: str = "constant"

    @classmethod
    def of(cls, conv: nn.Conv2d) -> "Windows":
        """Those of a float convolution."""
        (kh, kw), (sh, sw), (dh, dw) = conv.kernel_size, conv.stride, conv.dilation
        if conv.padding == "same":  # the odd pixel goes to the right and to the bottom
            across, down = dw * (kw - 1), dh * (kh - 1)
            padding = (across // 2, across - across // 2, down // 2, down - down // 2)
        elif isinstance(conv.padding, str):
            padding = (0, 0, 0, 0)
        else:
            padding = (conv.padding[1], conv.padding[1], conv.padding[0], conv.padding[0])
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        return cls((kh, kw), (sh, sw), (dh, dw), padding, conv.groups, mode)

    def padded(self, x: Tensor) -> Tensor:
        """[B, C, H, W] with its border; the same tensor where there is none."""
        return F.pad(x, self.padding, mode=self.mode) if any(self.padding) else x

    def of_pixels(self, x: Tensor) -> Tensor:
        """Padded pixels [B, H, W, C] -> a view [B, H', W', C, kh, kw] of every window."""
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True)]
        found = x.unfold(1, reach[0], self.stride[0]).unfold(2, reach[1], self.stride[1])
        return found[..., :: self.dilation[0], :: self.dilation[1]]

    def rows(self, x: Tensor, most: int | None = None, seed: int = 0) -> Tensor:
        """[B, C, H, W] -> [B, H' W', K], or `most` of the windows of each image, drawn."""
        found = self.of_pixels(self.padded(x).permute(0, 2, 3, 1))
        height, width = found.shape[1:3]
        if most is None or most >= height * width:
            return found.flatten(3).flatten(1, 2)
        kept = drawn(height * width, most, seed).to(x.device)
        return found[:, kept // width, kept % width].flatten(2)


def drawn(n: int, most: int, seed: int) -> Tensor:
    """`most` of the numbers below n, in order; all where there are no more."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(n, generator=generator)[:most].sort().values
