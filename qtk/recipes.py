"""Names that users type, as the parts that they stand for."""

from dataclasses import dataclass

from qtk.discover import available, load
from qtk.errors import SchemeError
from qtk.scheme import FLOAT

# the public name of a method -> the file in qtk/transform; any file there is a method by itself
METHODS = {
    "os+": "outlier_suppression",
    "os+rotate": "rotate_scaled",
    "equalize+rotate": "rotate_equalized",
    "none": None,
}


# What a preset fills in where nothing was given: (method, rounding, ranges), by activation bits.
# Times and cosines are of MiniLM with 256 sentences; see benchmarks/results/README.md.
PRESETS: dict[str, dict[str, tuple[str, str, str]]] = {
    "fast": {
        "float": ("none", "nearest", "auto"),
        "wide": ("os+", "nearest", "minmax"),
        "narrow": ("os+", "nearest", "minmax"),
    },
    "balanced": {
        "float": ("none", "gptq", "auto"),
        "wide": ("os+", "gptq", "auto"),  # at 8 bits what costs nothing when the model runs
        "narrow": ("equalize+rotate", "gptq", "auto"),  # below, what keeps the accuracy
    },
    "best": {  # minutes: learns, and gains by it from some thousand samples on
        "float": ("none", "gptq", "auto"),
        "wide": ("rotate", "gptq", "auto"),
        "narrow": ("equalize+rotate", "tuned", "auto"),
    },
}


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
    def of(
        cls, a: int, method: str | None = None, rounding: str | None = None,
        ranges: str | None = None, preset: str | None = None,
    ) -> "Recipe":  # fmt: skip
        """What was asked for, the rest as the preset ("balanced" by default) says for `a` bits.

        Raises:
            SchemeError: a name that no file stands for; the message lists those there are.
        """
        _check("preset", preset or "balanced", list(PRESETS))
        width = "float" if a == FLOAT else "wide" if a >= 8 else "narrow"
        defaults = PRESETS[preset or "balanced"][width]
        given = (method, rounding, ranges)
        method, rounding, ranges = (g or d for g, d in zip(given, defaults, strict=True))
        chosen = METHODS.get(method, method)
        methods = sorted({*METHODS, *available("transform")} - set(filter(None, METHODS.values())))
        _check("method", method, [*methods, *available("transform")], methods)
        _check("rounding", rounding, available("round"))
        _check("ranges", ranges, ["auto", *available("ranges")])
        return cls(chosen, rounding, ranges)

    @property
    def public_method(self) -> str:
        """What a user types for the method."""
        names = {file: name for name, file in METHODS.items()}
        return names.get(self.method) or str(self.method)

    @property
    def needs_gradients(self) -> bool:
        """Whether ranges are searched on the gradients of the whole float model."""
        return self.ranges != "auto" and hasattr(load("ranges", self.ranges), "NEEDS_PROBE")

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
