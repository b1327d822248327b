"""Rotation with Outlier Suppression+'s shift and scale in front, whatever measures best.

The candidates are the channels' means and their mid-ranges as shift, and that paper's channel
scales (eq. 8), each followed by the rotation of qtk/transform/rotate.py. The one with the smallest
error of the site's output is taken. Nothing can precede a rotation that was merged into the model:
such sites choose among shifts and scales alone.
"""

import torch

from qtk import ranks
from qtk.grids import Change
from qtk.observe import Site
from qtk.scheme import Scheme
from qtk.transform._output_loss import channel_scales, output_loss
from qtk.transform._rotation import merge as merge


def find(site: Site, scheme: Scheme, *, candidates: int = 6) -> Change:
    """The best of the candidates; plain rotation without data.

    Args:
        candidates: channel scales tried with each shift, none at all among them.
    """
    rotation = not site.group.rotated
    if not site.has_data:
        return Change(rotation=rotation)
    lo, hi = site.lo.amin(0), site.hi.amax(0)
    middle, reach = (hi + lo) / 2, (hi - lo) / 2
    scales = channel_scales(reach, candidates)
    # inputs that stay in floating point need no shift
    shifts = (site.rows.mean(0), middle) if scheme.a is not None else (torch.zeros_like(middle),)
    changes = [Change(shift, scale, rotation) for shift in shifts for scale in scales]
    return ranks.least(changes, output_loss(site, scheme))
