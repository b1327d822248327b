"""The patch embedding of vision transformers on integers: a convolution that strides by its size
is a linear layer on patches, and one dynamic scale a patch needs no calibration.
"""

from typing import Any

from torch import Tensor, nn

from qtk.modules.linear import InputGrid, QuantLinear
from qtk.scheme import Scheme


class QuantPatchConv(QuantLinear):
    """Conv2d with kernel = stride. C channels, [kh, kw] pixels; K = C kh kw, P patches."""

    def __init__(
        self, kernel: tuple[int, ...], in_features: int, out_features: int, scheme: Scheme,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, scheme, **kwargs)
        self.kernel_size = kernel

    @classmethod
    def like(cls, conv: nn.Conv2d, scheme: Scheme, **kwargs: Any) -> "QuantPatchConv":
        """An empty one for a float convolution."""
        K = conv.weight[0].numel()
        return cls(conv.kernel_size, K, conv.out_channels, scheme, **kwargs)

    @classmethod
    def of_conv(
        cls, conv: nn.Conv2d, codes: Tensor, scale: Tensor, grid: InputGrid, scheme: Scheme,
        backend: str,
    ) -> "QuantPatchConv":  # fmt: skip
        """A layer ready to run; codes [N, K] and scale [N, G] as `QuantLinear.from_codes`."""
        linear = QuantLinear.from_codes(codes, scale, conv.bias, grid, scheme, backend)
        layer = cls.like(
            conv, scheme, bias=conv.bias is not None, backend=backend, device=codes.device
        )
        layer.load_state_dict(linear.state_dict())
        layer.prepare()
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, height, width] -> [B, N, height / kh, width / kw]."""
        height, width = (n // k for n, k in zip(x.shape[2:], self.kernel_size, strict=True))
        patches = nn.functional.unfold(x, self.kernel_size, stride=self.kernel_size)  # [B, K, P]
        y: Tensor = super().forward(patches.transpose(1, 2))
        return y.transpose(1, 2).unflatten(-1, (height, width))


def is_patch_conv(module: nn.Module) -> bool:
    """Whether a module is a convolution that cuts an image into patches."""
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == module.stride
        and module.padding in ((0, 0), "valid")
        and module.groups == 1
        and module.dilation == (1, 1)
    )
