"""SmoothQuant, Xiao et al. 2023, https://arxiv.org/abs/2211.10438, eq. 4.

    s_j = max|X_j| ** alpha / max|W_j| ** (1 - alpha)

at the outputs of LayerNorms, shared by all the linears that read one.
"""

import torch

from qtk.grids import Change
from qtk.observe import Site
from qtk.scheme import Scheme

ALPHA = 0.5  # the paper's value for OPT: half of the difficulty moves to the weights
EPS = 1e-5


def find(site: Site, scheme: Scheme) -> Change:
    """The channel scale of one site; none away from LayerNorms and without data."""
    w_max = site.weight().abs().amax(0)
    if scheme.a is None or not site.has_data or site.group.norm is None:
        return Change()
    x_max = torch.maximum(-site.lo.amin(0), site.hi.amax(0))
    scale = x_max.clamp(min=EPS) ** ALPHA / w_max.clamp(min=EPS) ** (1 - ALPHA)
    return Change(torch.zeros_like(scale), scale.clamp(min=EPS))
