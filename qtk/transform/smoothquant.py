"""SmoothQuant, Xiao et al. 2023, https://arxiv.org/abs/2211.10438, eq. 4.

    s_j = max|X_j| ** alpha / max|W_j| ** (1 - alpha)

at the outputs of LayerNorms, shared by all the linears that read one.
"""

import torch

from qtk.observe import Site
from qtk.scheme import Scheme
from qtk.transform import Transform

ALPHA = 0.5  # the paper's value for OPT: half of the difficulty moves to the weights
EPS = 1e-5


def find(site: Site, scheme: Scheme) -> Transform:
    """shift [K] = 0 and channel_scale [K]; all ones away from LayerNorms and without data."""
    w_max = site.weight().abs().amax(0)
    one = torch.ones_like(w_max)
    if scheme.a is None or not site.has_data or site.group.norm is None:
        return one * 0, one
    x_max = torch.maximum(-site.lo.amin(0), site.hi.amax(0))
    scale = x_max.clamp(min=EPS) ** ALPHA / w_max.clamp(min=EPS) ** (1 - ALPHA)
    return one * 0, scale.clamp(min=EPS)
