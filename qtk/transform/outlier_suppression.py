"""Outlier Suppression+, Wei et al. 2023, https://arxiv.org/abs/2304.09145.

    shift_j = (max_t X_tj + min_t X_tj) / 2                               eq. 2
    s_j     = max(1, max_t |X_tj - shift_j| / t)                          eq. 8

with one threshold t a site, searched for the smallest error of what the site's linears compute.
The paper treats the outputs of LayerNorms; here the context and the activation before the second
MLP linear are treated too, because the fused quantizers make it free.
"""

from qtk.grids import Change
from qtk.observe import Site
from qtk.scheme import Scheme
from qtk.transform._output_loss import channel_scales, output_loss

CANDIDATES = 24  # thresholds tried, geometric from the full range downward


def find(site: Site, scheme: Scheme) -> Change:
    """shift and channel_scale of one site; none where there is no data or nothing to gain."""
    if not site.has_data or scheme.a is None or scheme.w is None:
        return Change()
    lo, hi = site.lo.amin(0), site.hi.amax(0)
    shift, reach = (hi + lo) / 2, (hi - lo) / 2  # [K]
    changes = [Change(shift, scale) for scale in channel_scales(reach, CANDIDATES)]
    return min(changes, key=output_loss(site, scheme))  # a tie: the one that scales less
