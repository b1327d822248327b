"""Rotation: QuaRot, Ashkboos et al. 2024, https://arxiv.org/abs/2404.00456, applied online.

A Hadamard matrix spreads every channel over all, so that no outlier channel is left and the
distribution is close to normal. Before it the mean of every channel is taken off: a constant that
the rotation would only smear goes into the bias.
"""

from qtk.observe import Site
from qtk.scheme import Scheme
from qtk.transform import Change


def find(site: Site, scheme: Scheme) -> Change:
    """shift = the channels' means, channel_scale = 1, and a rotation."""
    weight = site.weight()
    none = Change.none(weight.shape[1], weight.device)
    shift = site.rows.mean(0) if site.has_data and scheme.a is not None else none.shift
    return Change(shift, none.channel_scale, rotation=scheme.a is not None)
