"""Changes of variable before quantization; one file a paper.

A transform is a function `find(site, scheme) -> Change`. It never touches the module that produces
x, so it needs to know nothing about the model: the quantizer of the site's input applies it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qtk import hadamard


@dataclass(frozen=True)
class Change:
    """x' = ((x - shift) / channel_scale) R  and  W' = (W * channel_scale) R,  b' = b + W @ shift

    so that x' W'^T + b' = x W^T + b, R being the orthogonal matrix of `qtk.hadamard` or none.

    Attributes:
        shift, channel_scale: [K] float32.
        rotation: whether there is an R.
    """

    shift: Tensor
    channel_scale: Tensor
    rotation: bool = False

    @classmethod
    def none(cls, K: int, device: torch.device | None = None) -> "Change":
        return cls(torch.zeros(K, device=device), torch.ones(K, device=device))

    @property
    def is_none(self) -> bool:
        plain = (self.shift == 0).all() and (self.channel_scale == 1).all()
        return bool(plain) and not self.rotation

    def inputs(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., K]."""
        x = (x - self.shift) / self.channel_scale
        return hadamard.rotate(x) if self.rotation else x

    def weight(self, w: Tensor) -> Tensor:
        """[N, K] -> [N, K]."""
        w = w * self.channel_scale
        return hadamard.rotate(w) if self.rotation else w
