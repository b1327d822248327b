"""SmoothQuant, Xiao et al. 2023, https://arxiv.org/abs/2211.10438, eq. 4.

    s_j = max|X_j| ** alpha / max|W_j| ** (1 - alpha)

at the outputs of LayerNorms, shared by all the linears that read one. Where inputs stay in floating
point, it keeps the weights that meet large inputs from the coarse end of their grid, which is the
idea of AWQ, Lin et al. 2023, https://arxiv.org/abs/2306.00978, with maxima for sizes.
"""

import torch

from qtk.grids import Change
from qtk.observe import Site
from qtk.scheme import Scheme

EPS = 1e-5


def find(site: Site, scheme: Scheme, *, alpha: float = 0.5) -> Change:
    """The channel scale of one site; none away from LayerNorms and without data.

    Args:
        alpha: the paper's value for OPT: half of the difficulty moves to the weights.
    """
    if not site.has_data or site.group.norm is None:
        return Change()
    w_max = site.weight().abs().amax(0)
    x_max = torch.maximum(-site.lo.amin(0), site.hi.amax(0))
    scale = x_max.clamp(min=EPS) ** alpha / w_max.clamp(min=EPS) ** (1 - alpha)
    return Change(torch.zeros_like(scale), scale.clamp(min=EPS))
