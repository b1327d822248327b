"""Rotation: QuaRot, Ashkboos et al. 2024, https://arxiv.org/abs/2404.00456.

A Hadamard matrix spreads every channel over all, so that no outlier channel is left and the
distribution is close to normal. Before it the mean of every channel is taken off: a constant that
the rotation would only smear goes into the bias. The quantizer of a site's input rotates, unless
the model could be rotated once and for all beforehand (qtk/transform/_merge.py).
"""

from qtk.observe import Site
from qtk.scheme import Scheme
from qtk.transform import Change
from qtk.transform._merge import prepare as prepare


def find(site: Site, scheme: Scheme) -> Change:
    """shift = the channels' means, channel_scale = 1, and a rotation unless the input has one."""
    weight = site.weight()
    none = Change.none(weight.shape[1], weight.device)
    shift = site.rows.mean(0) if site.has_data and scheme.a is not None else none.shift
    return Change(shift, none.channel_scale, scheme.a is not None and not site.group.rotated)
