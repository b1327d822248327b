"""Names that users type, as the parts that they stand for."""

from dataclasses import dataclass

from qtk.discover import available
from qtk.errors import SchemeError

# the public name of a method -> the file in qtk/transform; any file there is a method by itself
METHODS = {"os+": "outlier_suppression", "none": None}


@dataclass(frozen=True)
class Recipe:
    """Which parts a quantization is made of.

    Attributes:
        method: a file in qtk/transform, or None.
        rounding: a file in qtk/round.
        ranges: a file in qtk/ranges, or "auto".
    """

    method: str | None
    rounding: str
    ranges: str

    @classmethod
    def of(cls, method: str, rounding: str, ranges: str) -> "Recipe":
        """Checks the names.

        Raises:
            SchemeError: a name that no file stands for; the message lists those there are.
        """
        chosen = METHODS.get(method, method)
        methods = sorted({*METHODS, *available("transform")} - set(filter(None, METHODS.values())))
        _check("method", method, [*methods, *available("transform")], methods)
        _check("rounding", rounding, available("round"))
        _check("ranges", ranges, ["auto", *available("ranges")])
        return cls(chosen, rounding, ranges)

    def range_rule(self, reads_norm: bool, rotated: bool) -> str:
        """The file in qtk/ranges for one site.

        "auto" keeps the whole range of a LayerNorm's output, whose extremes sit on the [CLS] token
        and matter, and clips the context and the activation, whose extremes do not, and everything
        that was rotated.
        """
        if self.ranges != "auto":
            return self.ranges
        return "minmax" if reads_norm and not rotated else "weighted_mse"


def _check(what: str, name: str, allowed: list[str], shown: list[str] | None = None) -> None:
    if name not in allowed:
        choices = ", ".join(repr(n) for n in (shown or allowed))
        raise SchemeError(f"{what}={name!r}: choose {choices}")
