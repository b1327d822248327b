"""bits="auto": eight bits for the units that gain most by them, within a share of the weights."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from qtk.errors import SchemeError
from qtk.mixed_precision import sensitivity
from qtk.mixed_precision.allocate import allocate
from qtk.mixed_precision.loss import Judge
from qtk.mixed_precision.space import Pair, Space
from qtk.models import describe
from qtk.observe import Batch
from qtk.scheme import FP8

SHARE = 0.1  # of the weights in the blocks that keep eight bits, at most
KEPT_BITS = 8
PROBES = 2  # batches that the output is compared on


def share_of(bits: str) -> float:
    """ "auto" or "auto:0.2" -> the share of the weights that may keep eight bits.

    Raises:
        SchemeError: anything else.
    """
    word, _, number = bits.partition(":")
    try:
        share = float(number) if number else SHARE
    except ValueError:
        share = -1.0
    if word != "auto" or not 0 < share < 1:
        raise SchemeError(f"bits={bits!r}: give 'auto', 'auto:0.2' for a share, or a dict")
    return share


def pairs_of(bits: str, w: Any, a: Any, calib: object) -> tuple[Pair, Pair]:
    """What the others become, and what the sensitive ones keep.

    Raises:
        SchemeError: the two are the same, or there is nothing to measure on.
    """
    share_of(bits)
    if FP8 in (w, a):
        raise SchemeError(f"bits={bits!r} chooses among integers; leave it out with {FP8!r}")
    if calib is None:
        raise SchemeError(f"bits={bits!r} measures on data: give calib")
    narrow, wide = (int(w), int(a)), (max(int(w), KEPT_BITS), max(int(a), KEPT_BITS))
    if narrow == wide:
        raise SchemeError(
            "bits='auto' changes nothing: it keeps layers at 8 bits, and all have as many"
        )
    return narrow, wide


def sensitive(
    model: nn.Module, batches: Sequence[Batch], bits: str, pairs: tuple[Pair, Pair],
    options: Mapping[str, Any], backend: str,
) -> dict[str, Pair]:  # fmt: skip
    """Names of linears that keep the second pair, with it.

    Each unit is quantized alone, at both; the integer program finds the smallest sum of losses.

    Args:
        options: of `qtk.pipeline.request.Request.of`, but for w, a and bits.
    """
    blocks = describe(model)
    space = Space.of(model, blocks, pairs, batches, options)
    judge = Judge.of(model, batches[:: max(len(batches) // PROBES, 1)][:PROBES])
    found = sensitivity.measure(
        model, blocks, batches, judge, space, seed=options["seed"], backend=backend, randoms=0,
        pairs=False,
    )  # fmt: skip
    weights = np.array([[0.0, unit.weights] for unit in space.units])
    limit = share_of(bits) * float(weights.sum())
    chosen = allocate(found.effects, [(weights, limit)])
    assert chosen is not None, "no unit at all keeps eight bits: that is always within the share"
    return {n: pair for n, pair in space.bits(chosen).items() if pair == pairs[1]}
