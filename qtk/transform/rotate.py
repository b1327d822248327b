"""Rotation: QuaRot, Ashkboos et al. 2024, https://arxiv.org/abs/2404.00456.

A Hadamard matrix spreads every channel over all, so that no outlier channel is left and the
distribution is close to normal. Before it the mean of every channel is taken off: a constant that
the rotation would only smear goes into the bias. The quantizer of a site's input rotates, unless
the model could be rotated once and for all beforehand (qtk/transform/_rotation.py).
"""

from qtk.grids import Change
from qtk.observe import Site
from qtk.scheme import Scheme
from qtk.transform._rotation import merge as merge
from qtk.transform._rotation import plain


def find(site: Site, scheme: Scheme) -> Change:
    """The means as shift, and the rotation unless the input has one."""
    return plain(site, scheme)
