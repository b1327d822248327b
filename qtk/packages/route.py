"""The packages for one way to call a model, and which of them serves a size."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from qtk.packages.package import Package, Signature, Size

PLAIN = "plain"  # the route of a call without a cache


@dataclass(frozen=True)
class Timing:
    """Median seconds at one size.

    Attributes:
        static: of the package of that size, if there is one; `dynamic` likewise.
        eager: of the quantized model without packages.
    """

    size: Size
    eager: float
    static: float | None = None
    dynamic: float | None = None

    @property
    def work(self) -> int:
        """Tokens, or images."""
        return self.size[0] * (self.size[1] or 1)


@dataclass
class Route:
    """Packages of one signature.

    Attributes:
        pad_id: the token to pad with.
        most_tokens: that the model has positions for.
    """

    signature: Signature
    packages: list[Package]
    timings: list[Timing]
    pad_id: int = 0
    _chosen: dict[Size, Package | None] = field(default_factory=dict)

    def choose(self, size: Size) -> Package | None:
        """The package that is expected to be the fastest for these rows and tokens, padded or not.

        None where the model's own forward is. Between the measured sizes times are interpolated.
        """
        if size not in self._chosen:
            if len(self._chosen) >= MOST_KEPT:
                self._chosen.clear()
            self._chosen[size] = self._best(size)
        return self._chosen[size]

    def _best(self, size: Size) -> Package | None:
        rows, tokens = size
        eager = [(t.work, t.eager) for t in self.timings]
        best, least = None, _expected(eager, size) if eager else float("inf")
        static = {t.size: t.static for t in self.timings}
        dynamic = [(t.work, t.dynamic) for t in self.timings if t.dynamic is not None]
        for package in self.packages:
            if package.size is None:
                seconds = _expected(dynamic, size) if dynamic else 0.0
            elif package.size[0] >= rows and (package.size[1] or 0) >= (tokens or 0):
                seconds = static.get(package.size) or 0.0
            else:
                continue
            if seconds < least:
                best, least = package, seconds
        return best


MOST_KEPT = 10_000  # sizes whose choice is remembered


def _expected(measured: Sequence[tuple[int, float]], size: Size) -> float:
    """Seconds for so many tokens: linear between those measured, proportional above them."""
    work = size[0] * (size[1] or 1)
    points = sorted(measured)
    last_work, last = points[-1]
    if work > last_work:
        return last * work / last_work
    return float(np.interp(work, [w for w, _ in points], [s for _, s in points]))
