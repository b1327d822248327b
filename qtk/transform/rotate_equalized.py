"""Rotation after channel scales that share the error fairly between inputs and weights.

After a rotation, rounding's error is the same in every channel: the inputs' is in proportion to
sum_j (x_j / s_j)^2 and reaches the output through sum_j (w_j s_j)^2, and the weights' reaches it
the other way round. Both depend on the product of the two sums, which is smallest, by
Cauchy-Schwarz, where

    s_j^2 = size(x_j - shift_j) / size(w_j)

with root mean squares for sizes. The inputs' is a mean of fourth powers instead, where they have a
grid: it has to hold the large tokens too. SmoothQuant (https://arxiv.org/abs/2211.10438, eq. 4,
alpha = 1/2) takes maxima, which is what matters without a rotation. The scales ride on the shift,
which the quantizer of the input applies anyway, so that they cost nothing.
"""

import torch
from torch import Tensor

from qtk.grids import Change
from qtk.observe import Site
from qtk.scheme import Scheme
from qtk.transform._rotation import merge as merge
from qtk.transform._rotation import plain

FLOOR = 1e-3  # of the mean: keeps channels that never move, or that nobody reads, from 0 and inf


def find(site: Site, scheme: Scheme, *, power: int = 4) -> Change:
    """Plain rotation without data, and where it was merged, because nothing can precede it.

    Args:
        power: of the mean that is an input's size, where inputs have a grid.
    """
    change = plain(site, scheme)
    if not change.rotation or not site.has_data:
        return change
    rows = site.rows
    shift = torch.zeros_like(rows[0]) if change.shift is None else change.shift
    size = _size(rows - rows.mean(0), power if scheme.a is not None else 2)
    scale = (size / _size(site.weight(), 2)).sqrt()
    return Change(shift, scale / scale.log().mean().exp(), rotation=True)


def _size(x: Tensor, power: int) -> Tensor:
    """[T, K] -> [K], each channel's mean of that power, and the root of it."""
    size = x.abs().pow(power).mean(0).pow(1 / power)
    return size + FLOOR * size.mean().clamp(min=1e-12)
