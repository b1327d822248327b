"""Rotation behind channel scales that share the error fairly between inputs and weights.

Behind a rotation, rounding's error is the same in every channel: the inputs' is in proportion to
sum_j (x_j / s_j)^2 and reaches the output through sum_j (w_j s_j)^2, and the weights' reaches it
the other way round. Both depend on the product of the two sums, which is smallest, by
Cauchy-Schwarz, where

    s_j^2 = size(x_j - shift_j) / size(w_j)

with root mean squares for sizes. The inputs' is a mean of fourth powers instead: their grid has to
hold the large tokens too. SmoothQuant (https://arxiv.org/abs/2211.10438, eq. 4, alpha = 1/2) takes
maxima, which is what matters without a rotation. The scales ride on the shift, which the quantizer
of the input applies anyway, so that they cost nothing.
"""

from dataclasses import replace

from torch import Tensor

from qtk.grids import Change
from qtk.observe import Site
from qtk.scheme import Scheme
from qtk.transform import rotate
from qtk.transform._merge import prepare as prepare

FLOOR = 1e-3  # of the mean: keeps channels that never move, or that nobody reads, from 0 and inf


def find(site: Site, scheme: Scheme) -> Change:
    """Plain rotation without data, and where it was merged, because nothing can precede it."""
    change = rotate.find(site, scheme)
    if change.shift is None or not change.rotation:
        return change
    scale = (_size(site.rows - change.shift, 4) / _size(site.weight(), 2)).sqrt()
    return replace(change, channel_scale=scale / scale.log().mean().exp())


def _size(x: Tensor, power: int) -> Tensor:
    """[T, K] -> [K], each channel's mean of that power, and the root of it."""
    size = x.abs().pow(power).mean(0).pow(1 / power)
    return size + FLOOR * size.mean().clamp(min=1e-12)
