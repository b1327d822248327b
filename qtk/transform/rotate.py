"""Rotation: QuaRot, Ashkboos et al. 2024, https://arxiv.org/abs/2404.00456.

A Hadamard matrix spreads every channel over all, so that no outlier channel is left and the
distribution is close to normal. Before it the mean of every channel is taken off: a constant that
the rotation would only smear goes into the bias. The quantizer of a site's input rotates, unless
the model could be rotated once and for all beforehand (qtk/transform/_merge.py).
"""

from dataclasses import replace

import torch

from qtk.grids import Change
from qtk.observe import Site
from qtk.scheme import Scheme
from qtk.transform._merge import prepare as prepare


def find(site: Site, scheme: Scheme) -> Change:
    """shift = the channels' means, channel_scale = 1, and a rotation unless the input has one."""
    if scheme.a is None:
        return Change()
    change = Change(rotation=not site.group.rotated)
    if not site.has_data:
        return change
    shift = site.rows.mean(0)
    return replace(change, shift=shift, channel_scale=torch.ones_like(shift))
