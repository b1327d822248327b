"""Names that users type, as the parts that they stand for; resolved once for each layer."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from qtk.discover import available
from qtk.errors import SchemeError
from qtk.ranges import CheckedRule, rule_of
from qtk.round import CheckedRounder, rounder_of
from qtk.scheme import FLOAT, FP8, Scheme
from qtk.transform import CheckedTransform, transform_of

# the public name of a method -> the file in qtk/transform; any file there is a method by itself
METHODS = {
    "os+": "outlier_suppression",
    "os+rotate": "rotate_scaled",
    "equalize+rotate": "rotate_equalized",
    "none": "none",
}
# a rounding that goes on learning -> the rounder that it starts from, and what learns
LEARNING = {"block": ("gptq", "block"), "tuned": ("gptq", "model")}
LEARNERS = ("none", "block", "model")

# What a preset fills in where nothing was given: (method, rounding, ranges), by activation bits.
# Times and cosines are of MiniLM with 256 sentences; see benchmarks/results/README.md.
PRESETS: dict[str, dict[str, tuple[str, str, str]]] = {
    "fast": {
        "fp8": ("none", "nearest", "auto"),
        "float": ("none", "nearest", "auto"),
        "wide": ("os+", "nearest", "minmax"),
        "narrow": ("os+", "nearest", "minmax"),
    },
    "balanced": {
        "fp8": ("none", "nearest", "auto"),
        "float": ("none", "gptq", "auto"),
        "wide": ("os+", "gptq", "auto"),  # at 8 bits what costs nothing when the model runs
        "narrow": ("equalize+rotate", "gptq", "auto"),  # below, what keeps the accuracy
    },
    "best": {  # minutes: learns, and gains by it from some thousand samples on
        "fp8": ("none", "nearest", "auto"),
        "float": ("none", "gptq", "auto"),
        "wide": ("rotate", "gptq", "auto"),
        "narrow": ("equalize+rotate", "tuned", "auto"),
    },
}


@dataclass(frozen=True)
class Recipe:
    """Which parts a layer is made with.

    Attributes:
        transform, rounder: the parts.
        rule: where activation grids end, None for "auto".
        learn: what would learn after rounding, "block" or "model"; None for nothing. The whole
            model does what its default recipe says.
    """

    transform: CheckedTransform
    rounder: CheckedRounder
    rule: CheckedRule | None
    learn: str | None = field(default=None, compare=False)

    @classmethod
    def of(
        cls, a: int | str, method: object = None, rounding: object = None, ranges: object = None,
        learn: str | None = None, preset: str | None = None,
    ) -> "Recipe":  # fmt: skip
        """What was asked for, the rest as the preset ("balanced" by default) says for `a` bits.

        Args:
            method, rounding, ranges: names, or parts of the caller's own (`qtk.discover.part`).

        Raises:
            SchemeError: a name that no file stands for; the message lists those there are.
        """
        _check("preset", "balanced" if preset is None else preset, list(PRESETS))
        given = (method, rounding, ranges)
        defaults = PRESETS[preset or "balanced"][_width(a)]
        if a == FP8:
            _check_fp8(*given, learn)
        chosen = [d if g is None else g for g, d in zip(given, defaults, strict=True)]
        rounder, learns = _rounding(chosen[1], learn, asked=rounding is not None)
        return cls(_transform(chosen[0]), rounder, _rule(chosen[2]), learns)

    @property
    def method(self) -> str:
        """What a user types for the transform."""
        names = {file: name for name, file in METHODS.items()}
        return names.get(self.transform.name, self.transform.name)

    @property
    def ranges(self) -> str:
        """What a user types for the rule."""
        return "auto" if self.rule is None else self.rule.name

    @property
    def needs_gradients(self) -> bool:
        """Whether ranges are searched on the gradients of the whole float model."""
        return self.rule is not None and self.rule.needs_probe

    def rule_for(self, reads_norm: bool, rotated: bool) -> CheckedRule:
        """The range rule of one site.

        "auto" keeps the whole range of a LayerNorm's output, whose extremes sit on the [CLS] token
        and matter, and clips the context and the activation, whose extremes do not, and everything
        that was rotated.
        """
        if self.rule is not None:
            return self.rule
        return rule_of("minmax" if reads_norm and not rotated else "weighted_mse")

    def without_transform(self) -> "Recipe":
        """The same for layers that have no change of variable."""
        return replace(self, transform=_transform("none"))

    def quick(self) -> "Recipe":
        """The same for a first look: rounded to nearest, without gradients."""
        rule = None if self.needs_gradients else self.rule
        return replace(self, rounder=rounder_of("nearest"), rule=rule)


@dataclass(frozen=True)
class Choice:
    """What becomes of one linear: its scheme, and the recipe that it is made by."""

    scheme: Scheme
    recipe: Recipe

    def facts(self) -> list[Any]:
        """What tells it from another, as JSON knows it; a caller's own part by its name."""
        recipe = self.recipe
        return [asdict(self.scheme), recipe.method, recipe.rounder.name, recipe.ranges]


def _width(a: int | str) -> str:
    """The column of PRESETS."""
    if isinstance(a, str):
        return FP8
    return "float" if a == FLOAT else "wide" if a >= 8 else "narrow"


def _check_fp8(method: object, rounding: object, ranges: object, learn: str | None) -> None:
    """Raises SchemeError where a part is asked for that knows integer grids alone."""
    only = {"method": (method, "none"), "rounding": (rounding, "nearest"),
            "ranges": (ranges, "auto"), "learn": (learn, "none")}  # fmt: skip
    for what, (given, fits) in only.items():
        if given not in (None, fits):
            raise SchemeError(f"{what}={given!r} is for integer grids; w='fp8' rounds to nearest")


def _transform(given: object) -> CheckedTransform:
    if isinstance(given, str):
        others = set(available("transform")) - set(METHODS.values())
        _check("method", given, [*METHODS, *available("transform")], sorted({*METHODS, *others}))
        return transform_of(METHODS.get(given, given))
    return transform_of(given)


def _rounding(given: object, learn: str | None, asked: bool) -> tuple[CheckedRounder, str | None]:
    """The rounder and what learns after it, which `learn` decides unless a name that was asked for
    says otherwise."""
    if learn is not None:
        _check("learn", learn, list(LEARNERS))
    if isinstance(given, str):
        _check("rounding", given, sorted([*available("round"), *LEARNING]))
    if isinstance(given, str) and given in LEARNING:
        start, learns = LEARNING[given]
        if asked and learn not in (None, learns):
            raise SchemeError(
                f"rounding={given!r} is {start!r} with learn={learns!r}; learn={learn!r} says "
                "otherwise: give one of the two"
            )
        given, learn = start, learn or learns
    return rounder_of(given), None if learn == "none" else learn


def _rule(given: object) -> CheckedRule | None:
    if isinstance(given, str):
        _check("ranges", given, ["auto", *available("ranges")])
        return None if given == "auto" else rule_of(given)
    return rule_of(given)


def _check(what: str, name: object, allowed: list[str], shown: list[str] | None = None) -> None:
    if name not in allowed:
        choices = ", ".join(repr(n) for n in (shown or allowed))
        raise SchemeError(f"{what}={name!r}: choose {choices}")
