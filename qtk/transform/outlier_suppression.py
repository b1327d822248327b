"""Outlier Suppression+, Wei et al. 2023, https://arxiv.org/abs/2304.09145.

    shift_j = (max_t X_tj + min_t X_tj) / 2                               eq. 2
    s_j     = max(1, max_t |X_tj - shift_j| / t)                          eq. 8

with one threshold t a site, searched for the smallest error of what the site's linears compute.
The paper treats the outputs of LayerNorms; here the context and the activation before the second
MLP linear are treated too, because the fused quantizers make it free.
"""

import torch

from qtk import ranks
from qtk.grids import Change
from qtk.observe import Site
from qtk.scheme import Scheme
from qtk.transform._output_loss import channel_scales, output_loss


def find(site: Site, scheme: Scheme, *, candidates: int = 24) -> Change:
    """shift and channel_scale of one site; none where there is no data or nothing to gain.

    Args:
        candidates: thresholds tried, geometric from the full range downward.
    """
    if not site.has_data:
        return Change()
    lo, hi = site.lo.amin(0), site.hi.amax(0)
    shift, reach = (hi + lo) / 2, (hi - lo) / 2  # [K]
    if scheme.a is None:
        shift = torch.zeros_like(shift)  # changes nothing for inputs in floating point
    changes = [Change(shift, scale) for scale in channel_scales(reach, candidates)]
    return ranks.least(changes, output_loss(site, scheme))  # a tie: the one that scales less
