"""Changes of variable before quantization; one file a paper.

A transform is a function `find(site, scheme) -> Change`, with settings as keywords. It never
touches the module that produces x, so it needs to know nothing about the model: the layer's own
quantizer applies it, or a product of float inputs does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from qtk import discover
from qtk.errors import SchemeError
from qtk.grids import Change
from qtk.models import Block
from qtk.observe import Site
from qtk.scheme import Scheme

Merge = Callable[[nn.Module, Sequence[Block]], tuple[Block, ...]]


class Transform(Protocol):
    """What a file in this folder is, and a module or object of a user's.

    Optional member:
        merge: called once before anything is observed, with the model and its blocks; moves into
            the weights what can be moved, in place, and returns the blocks as they then are.
    """

    def find(self, site: Site, scheme: Scheme) -> Change: ...


@dataclass(frozen=True)
class CheckedTransform:
    """A transform whose answers are checked."""

    name: str
    transform: Callable[[Site, Scheme], Change]
    merge: Merge | None = None

    def find(self, site: Site, scheme: Scheme) -> Change:
        """The change of one site, without vectors that do nothing.

        Raises:
            SchemeError: it is none, or has vectors that are not [K] finite numbers, scales above 0.
        """
        answer = self.transform(site, scheme)
        fault = _fault(answer, site.weight().shape[1])
        if fault:
            raise SchemeError(f"method={self.name!r} gave {fault} for {site.name}")
        return answer.simplest()


def transform_of(given: object) -> CheckedTransform:
    """A transform by name, or a user's own; "none" is the one that changes nothing."""
    if given == "none":
        return CheckedTransform("none", _nothing)
    part = discover.part("transform", given)
    return CheckedTransform(part.name, part.find, part.member("merge", None))


def _nothing(site: Site, scheme: Scheme) -> Change:
    return Change()


def _fault(answer: object, K: int) -> str | None:
    """What is wrong with a transform's answer."""
    if not isinstance(answer, Change):
        return f"a {type(answer).__name__} where it must be a Change"
    for name, vector in (("shift", answer.shift), ("channel_scale", answer.channel_scale)):
        if vector is None:
            continue
        if not isinstance(vector, Tensor) or vector.shape != (K,):
            return f"a {name} of shape {list(getattr(vector, 'shape', []))} and not {[K]}"
        if not torch.isfinite(vector).all():
            return f"a {name} that holds nan or inf"
    if answer.channel_scale is not None and not (answer.channel_scale > 0).all():
        return "a channel_scale that is not above zero"
    return None
