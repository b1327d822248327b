"""Rotation with Outlier Suppression+'s shift and scale in front, whatever measures best.

The candidates are the channels' means and their mid-ranges as shift, and that paper's channel
scales (eq. 8), each followed by the rotation of qtk/transform/rotate.py. The one with the smallest
error of the site's output is taken. Nothing can precede a rotation that was merged into the model:
such sites choose among shifts and scales alone.
"""

from qtk.grids import Change
from qtk.observe import Site
from qtk.scheme import Scheme
from qtk.transform._merge import prepare as prepare
from qtk.transform._output_loss import channel_scales, output_loss

CANDIDATES = 6  # channel scales tried with each shift, none at all among them


def find(site: Site, scheme: Scheme) -> Change:
    """The best of the candidates; plain rotation without data."""
    rotation = scheme.a is not None and not site.group.rotated
    if not site.has_data or scheme.a is None or scheme.w is None:
        return Change(rotation=rotation)
    lo, hi = site.lo.amin(0), site.hi.amax(0)
    middle, reach = (hi + lo) / 2, (hi - lo) / 2
    scales = channel_scales(reach, CANDIDATES)
    shifts = (site.rows.mean(0), middle)
    changes = [Change(shift, scale, rotation) for shift in shifts for scale in scales]
    return min(changes, key=output_loss(site, scheme))
