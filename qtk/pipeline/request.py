"""What `quantize` was asked for: resolved, and checked as far as that goes without any data."""

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qtk.errors import SchemeError
from qtk.learn.model import SAMPLES as SAMPLES_TO_LEARN
from qtk.observe.batches import SAMPLES
from qtk.pipeline.assign import Assignment
from qtk.pipeline.recipes import Choice, Recipe
from qtk.ranges import clip_tokens
from qtk.scheme import FLOAT, AttentionScheme, Scheme

DEFAULTS: dict[str, Any] = {  # of the arguments of `quantize` that say what becomes of a model
    "activations": "static", "weights": "symmetric", "group_size": None, "attention": "float",
    "softmax": "float", "softmax_bits": None, "method": None, "rounding": None, "ranges": None,
    "learn": None, "preset": None, "bits": None, "skip": None,
}  # fmt: skip
FLOATS = Scheme(None, None)  # of what is skipped
SEEDS = 2**63  # what a generator takes, of either sign
OUTSIDE = ("w", "a", "group_size", "weights")  # what means something for heads and embeddings
PER_LAYER = (*OUTSIDE, "activations", "method", "rounding", "ranges")
NO_LAYER = "no linear of the blocks is quantized"


@dataclass(frozen=True)
class Request:
    """What is to be done.

    Attributes:
        default: what a linear of the blocks becomes that no pattern matches.
        overrides: what others become, by pattern of names; a scheme without grids is float.
        attention: how every block's products and softmax compute, None for floating point.
        learn: what learns after rounding, "block" or "model", or None: a choice of the whole model.
        seed: of everything that is drawn.
        samples: how many a file or folder gives at most.
        options: as given, for messages and the record.
        asked: the options that a pattern has of its own.
        blocks: patterns of the names of a plain network's blocks, None for its children.
    """

    default: Choice
    overrides: dict[str, Choice]
    attention: AttentionScheme | None
    learn: str | None
    seed: int
    samples: int
    options: dict[str, Any]
    asked: dict[str, Mapping[str, Any]]
    blocks: Sequence[str] | None = None

    @classmethod
    def of(
        cls, w: int | str, a: int | str, calib: object, *, attention: str, softmax: str,
        softmax_bits: int | None, bits: Any, skip: Any, seed: Any,
        blocks: Sequence[str] | None = None, **options: Any,
    ) -> "Request":  # fmt: skip
        """The arguments of `quantize` but for model, data and backend.

        Args:
            options: of a layer's scheme and recipe, as `_choice` takes them; None if not given.

        Raises:
            SchemeError: what does not exist, or does not go together.
        """
        if isinstance(seed, bool) or not isinstance(seed, int) or not -SEEDS <= seed < SEEDS:
            raise SchemeError(f"seed={seed!r}: give an integer of at most 63 bits")
        has_data = calib is not None
        products = AttentionScheme.of(attention, softmax, softmax_bits, a)
        if products is not None and products.needs_data and not has_data:
            raise SchemeError(f"{products.name} needs calibration data: pass calib=")
        preset, parts = options["preset"], ("method", "rounding", "ranges")
        if preset is not None and all(options[part] is not None for part in parts):
            raise SchemeError(
                f"preset={preset!r} fills in method, rounding and ranges, and all three are given"
            )
        options = {"w": w, "a": a, **options}
        default = _choice(has_data, **options)
        learn = default.recipe.learn
        if learn is not None and not has_data:
            what = options["rounding"] or learn
            raise SchemeError(f"{what!r} learns from data: give calib, or another rounding")
        asked = _asked(bits)
        return cls(
            default, _overrides(asked, skip, has_data, options), products, learn,
            seed, SAMPLES_TO_LEARN if learn == "model" else SAMPLES, options,
            asked, None if blocks is None else _patterns("blocks", blocks),
        )  # fmt: skip

    def facts(self) -> list[Any]:
        """Everything that decides what comes out but attention and the seed, as JSON knows it."""
        patterns = [(pattern, choice.facts()) for pattern, choice in self.overrides.items()]
        blocks = None if self.blocks is None else list(self.blocks)
        return [self.default.facts(), patterns, self.learn, *([blocks] if blocks else [])]

    def check(self, found: Assignment) -> None:
        """Raises SchemeError when nothing is left to do, or an option has nothing to work on."""
        inside, every = (
            found.quantized.values(),
            [*found.quantized.values(), *found.outside.values()],
        )
        if not every and self.attention is None:
            raise SchemeError("nothing is left to quantize: w=16, or skip matches every linear")
        mine, given = self.default.recipe, self.options
        rounded = [c.scheme for c in inside if c.recipe.rounder == mine.rounder]
        grids = [c.scheme.a for c in inside if c.scheme.a is not None]
        ruled = [c for c in inside if c.scheme.a is not None and c.recipe.rule == mine.rule]
        no_grid = "no layer has integer activations" if inside else NO_LAYER
        works: dict[str, tuple[object, str]] = {  # what an option works on, and why there is none
            "method": ([c for c in inside if c.recipe.transform == mine.transform], NO_LAYER),
            "rounding": (rounded, NO_LAYER),
            "learn": (inside, NO_LAYER),
            "preset": (inside, NO_LAYER),
            "ranges": (ruled, no_grid),
            "activations": (grids, no_grid),
            "weights": (every, "no layer has integer weights"),
            "group_size": (every, "no layer has integer weights"),
        }
        idle = {  # what says no more than that nothing is done; floats are clipped nowhere
            "ranges": ("auto", "minmax"), "method": ("none",), "activations": ("static",),
            "weights": ("symmetric",),
        }  # fmt: skip
        for option, (layers, why) in works.items():
            value = given[option]
            if value is not None and value not in idle.get(option, ()) and not layers:
                raise SchemeError(f"{option}={value!r} changes nothing: {why}; leave it out")
        for pattern, asked in self.asked.items():
            outside = fnmatch.filter(found.outside, pattern)
            if outside and (useless := [key for key in asked if key not in OUTSIDE]):
                raise SchemeError(
                    f"bits[{pattern!r}]: {outside[0]} lies outside the blocks, where inputs are "
                    f"dynamic and weights rounded to nearest; leave out {', '.join(useless)}"
                )

    def check_network(self, calib: object) -> None:
        """Raises SchemeError for what only blocks of attention can have, or no data at all."""
        if calib is None:
            raise SchemeError(
                "a network shows the order of its layers when it runs: pass calib=, batches as it "
                "reads them; one is enough for weights alone"
            )
        choices = [self.default, *self.overrides.values()]
        refused = {
            "attention, softmax": self.attention is not None,
            f"learn={self.learn!r}": self.learn is not None,
            "ranges that need gradients": any(c.recipe.needs_gradients for c in choices),
        }
        for what, asked in refused.items():
            if asked:
                raise SchemeError(
                    f"{what}: for blocks of attention and MLP, and this is another network"
                )

    def told(self, batches: Sequence[Any] | None, learned: dict[str, Any] | None) -> dict[str, Any]:
        """What the record says of the whole model; each layer says what it was made with itself."""
        recipe, scheme = self.default.recipe, self.default.scheme
        return {
            "method": recipe.method,
            "rounding": recipe.rounder.name,
            "ranges": recipe.ranges if scheme.a is not None else None,
            "learning": learned,
            "w": self.options["w"],
            "a": self.options["a"],
            "seed": self.seed,
            "calibration_batches": len(batches or ()),
        }


def _choice(
    has_data: bool, *, w: int | str, a: int | str, activations: str, weights: str,
    group_size: int | None, method: object, rounding: object, ranges: object, learn: str | None,
    preset: str | None,
) -> Choice:  # fmt: skip
    """What the options say of one layer.

    Raises:
        SchemeError: no such scheme or part, or a range rule that cannot do what it would have to.
    """
    if not has_data and activations == "static":
        activations = "token"  # nothing says where a static grid would end
    scheme = Scheme.of(w, a, activations, group_size, weights)
    recipe = Recipe.of(a, method, rounding, ranges, learn, preset)
    if recipe.rounder.needs_calib and not has_data:
        raise SchemeError(f"rounding={recipe.rounder.name!r} needs calibration data: pass calib=")
    rule = recipe.rule
    if rule is not None and scheme.a is not None:
        if scheme.a.granularity == "token" and not rule.tokens:
            without = "" if has_data else " (without calib, activations are dynamic)"
            raise SchemeError(
                f"ranges={rule.name!r} cannot end a grid that every token has for itself{without}; "
                f"activations='token' goes with 'auto', {', '.join(map(repr, clip_tokens()))}"
            )
        if rule.needs_probe and not has_data:
            raise SchemeError(f"ranges={rule.name!r} needs calibration data: pass calib=")
    return Choice(scheme, recipe)


def _overrides(
    asked: Mapping[str, Mapping[str, Any]], skip: Any, has_data: bool, options: dict[str, Any]
) -> dict[str, Choice]:
    """The patterns of `skip` and `bits`; `skip` comes first, and so wins."""
    floats = Recipe.of(FLOAT)
    chosen = {pattern: Choice(FLOATS, floats) for pattern in _patterns("skip", skip or ())}
    for pattern, mine in asked.items():
        if pattern in chosen:
            continue
        chosen[pattern] = choice = _choice(has_data, **{**options, **mine})
        no_grid = choice.scheme.w is None or choice.scheme.a is None
        useless: tuple[str, ...] = ("ranges", "activations") if no_grid else ()
        if choice.scheme.w is None:
            useless = tuple(key for key in mine if key not in ("w", "a"))
        if idle := [key for key in useless if key in mine]:
            raise SchemeError(f"bits[{pattern!r}]: nothing there has a grid for {', '.join(idle)}")
    return chosen


def _patterns(what: str, given: Any) -> Sequence[str]:
    """One pattern of names or several."""
    given = [given] if isinstance(given, str) else given
    if not isinstance(given, Sequence) or not all(isinstance(p, str) for p in given):
        raise SchemeError(f"{what}={given!r}: patterns of module names are strings")
    return given


def _asked(bits: Any) -> dict[str, Mapping[str, Any]]:
    """The options of every pattern: (w, a), or a dict of more."""
    bits = {} if bits is None else bits
    if not isinstance(bits, Mapping):
        raise SchemeError(f"bits={bits!r}: give {{pattern of module names: (w, a)}}")
    found: dict[str, Mapping[str, Any]] = {}
    for pattern, value in bits.items():
        if not isinstance(pattern, str):
            raise SchemeError(f"bits has {pattern!r}: patterns of module names are strings")
        if isinstance(value, (tuple, list)) and len(value) == 2:
            value = dict(zip(("w", "a"), value, strict=True))
        if not isinstance(value, Mapping) or not value:
            raise SchemeError(
                f"bits[{pattern!r}]={value!r}: give a pair (w, a), such as (4, 8), or a dict such "
                "as {'w': 4, 'group_size': 32}"
            )
        if unknown := [key for key in value if key not in PER_LAYER]:
            raise SchemeError(
                f"bits[{pattern!r}] has {', '.join(map(repr, unknown))}; choose "
                f"{', '.join(PER_LAYER)}"
            )
        found[pattern] = value
    return found
