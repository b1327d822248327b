"""What every group of linears reads, seen on data or imagined without any."""

from qtk.observe.imagine import imagine
from qtk.observe.site import Batch, Site
from qtk.observe.walk import Call, forward, run, walk

__all__ = ["Batch", "Call", "Site", "forward", "imagine", "run", "walk"]
