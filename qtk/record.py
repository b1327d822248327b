"""What a quantized model remembers of how it was made; read back, every field is checked.

    {"version": 3, "backend": "auto", "recipe": {...}, "layers": {name: {...}}, "attention": {...}}

is what stands under `quantization_config` in config.json, beside `quant_method`.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from qtk.errors import CheckpointError, SchemeError
from qtk.scheme import FP8, AttentionScheme, Scheme

VERSION = 3  # of the layout on disk; a newer one is refused
# 2 brought quantized attention and patch embeddings, 3 each layer's own recipe and what was learned
BACKENDS = ("auto", "triton", "cpu", "reference")
LONGEST = 1000  # characters of a text, and layers of a list of losses
MOST_LAYERS = 100_000
LOUDEST = 1e6  # dB

Check = tuple[str, Callable[[Any], bool]]  # what a field must be, in words and as a test


def _is_int(x: object) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _is_number(x: object) -> bool:
    if isinstance(x, float):
        return math.isfinite(x)
    return isinstance(x, int) and not isinstance(x, bool) and abs(x) < 2**63


def _or_none(check: Check) -> Check:
    return f"{check[0]} or null", lambda x: x is None or check[1](x)


BOOL: Check = ("true or false", lambda x: isinstance(x, bool))
TEXT: Check = ("a short text", lambda x: isinstance(x, str) and len(x) <= LONGEST)
COUNT: Check = ("a number from 0", lambda x: _is_int(x) and 0 <= x < 2**63)
BITS: Check = ("a number of bits or 'fp8'", lambda x: COUNT[1](x) or x == FP8)
SEED: Check = ("an integer of 64 bits", lambda x: _is_int(x) and -(2**63) <= x < 2**63)
DECIBELS: Check = ("a number of dB", lambda x: _is_number(x) and abs(x) <= LOUDEST)
DICT: Check = ("an object", lambda x: isinstance(x, dict))
BACKEND: Check = (f"one of {', '.join(BACKENDS)}", lambda x: isinstance(x, str) and x in BACKENDS)
LAYERS: Check = (
    "an object of layers",
    lambda x: isinstance(x, dict) and len(x) <= MOST_LAYERS and all(TEXT[1](n) and n for n in x),
)
LOSSES: Check = (
    "pairs of numbers",
    lambda x: isinstance(x, list) and len(x) <= LONGEST and all(_is_pair(pair) for pair in x),
)

LAYER_RECIPE = {"method": TEXT, "rounding": TEXT, "ranges": _or_none(TEXT)}
LAYER = {
    "scheme": DICT, "bias": BOOL, "transform": BOOL, "rotation": BOOL, "sqnr": _or_none(DECIBELS),
    "recipe": _or_none(DICT),
}  # fmt: skip
LEARNING = {"of": TEXT, "changed": BOOL, "held_out_loss": LOSSES}
RECIPE = {
    "method": TEXT, "rounding": TEXT, "ranges": _or_none(TEXT), "learning": _or_none(DICT),
    "w": BITS, "a": BITS, "seed": SEED, "calibration_batches": COUNT,
}  # fmt: skip
ATTENTION = {"bits": _or_none(COUNT), "softmax": TEXT, "softmax_bits": _or_none(COUNT)}
NAMES: Check = (
    "a list of names",
    lambda x: isinstance(x, list) and len(x) <= MOST_LAYERS and all(TEXT[1](n) and n for n in x),
)
RECORD = {
    "version": COUNT, "backend": BACKEND, "recipe": DICT, "layers": LAYERS,
    "attention": _or_none(DICT), "folded": NAMES,
}  # fmt: skip


def _is_pair(x: object) -> bool:
    return isinstance(x, list) and len(x) == 2 and all(n is None or _is_number(n) for n in x)


def checked(data: Any, what: str, fields: dict[str, Check], needed: tuple[str, ...] = ()) -> Any:
    """`data`, once it is known to be an object of these fields.

    Args:
        what: whose fields they are, for messages.
        needed: those that must be there.

    Raises:
        CheckpointError: another type, a field missing, unknown, or not what it must be.
    """
    if not isinstance(data, dict):
        raise CheckpointError(f"{what} is {shown(data)}, it must be an object")
    for name, value in data.items():
        if name not in fields:
            raise CheckpointError(
                f"{what} has a field {shown(name)}, which this qtk does not know; a newer one may"
            )
        words, holds = fields[name]
        if not holds(value):
            raise CheckpointError(f"{what}: {name} is {shown(value)}, it must be {words}")
    for name in needed:
        if name not in data:
            raise CheckpointError(f"{what} has no {name}")
    return data


def shown(value: object) -> str:
    """A value for a message: short, and without turning a huge number into digits."""
    if isinstance(value, int) and abs(value) >= 2**63:
        return "a huge integer"
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@dataclass(frozen=True)
class LayerRecipe:
    """What a layer was made with: what really ran, not what was asked for.

    Attributes:
        method: the transform, "none" where it left the layer's input as it is.
        rounding: how its weight became codes, before any learning.
        ranges: the rule that ended its input's grid, None where there was nothing to end.
    """

    method: str
    rounding: str
    ranges: str | None

    def __str__(self) -> str:
        return f"{self.method}, {self.rounding}, {self.ranges or 'no range'}"


@dataclass(frozen=True)
class Layer:
    """One quantized linear: enough to build it empty and fill it from tensors.

    Attributes:
        scheme: of its weight and input.
        bias, transform, rotation: whether it has them.
        sqnr: dB of its output on the calibration data, when there was any.
        recipe: None in records older than layout 3.
    """

    scheme: Scheme
    bias: bool
    transform: bool
    rotation: bool = False
    sqnr: float | None = None
    recipe: LayerRecipe | None = None

    def to_dict(self) -> dict[str, Any]:
        measured = self.sqnr is not None and math.isfinite(self.sqnr)  # JSON knows no infinity
        return {**asdict(self), "sqnr": self.sqnr if measured else None}

    @classmethod
    def from_dict(cls, data: Any, name: str = "a layer") -> "Layer":
        """Inverse of `to_dict`.

        Raises:
            CheckpointError: a field is missing, unknown or not what it must be.
        """
        what = f"the checkpoint's layer {shown(name)}"
        checked(data, what, LAYER, ("scheme", "bias", "transform"))
        recipe = data.get("recipe")
        if recipe is not None:
            recipe = LayerRecipe(
                **checked(recipe, f"{what}, recipe", LAYER_RECIPE, (*LAYER_RECIPE,))
            )
        try:
            scheme = Scheme.from_dict(data["scheme"])
        except SchemeError as error:
            raise CheckpointError(f"{what} is described badly: {str(error)[:200]}") from None
        if scheme.w is None:
            raise CheckpointError(f"{what} is described badly: its weight is in floating point")
        return cls(**{**data, "scheme": scheme, "recipe": recipe})


@dataclass(frozen=True)
class Record:
    """What `quantize` did.

    Attributes:
        layers: by module name inside the base model (without "bert.", "model." or "vit.").
        recipe: what the whole model was made with: the default layer's parts, what learned and what
            came of it, calibration size, seed. For people to read.
        backend: what was asked for: "auto", "triton", "cpu" or "reference".
        attention: how every block's products and softmax compute, None for floating point.
        folded: norms that went into the layers before them.
    """

    layers: dict[str, Layer]
    recipe: dict[str, Any] = field(default_factory=dict)
    backend: str = "auto"
    attention: AttentionScheme | None = None
    folded: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        data: dict[str, Any] = {
            "version": VERSION,
            "backend": self.backend,
            "recipe": self.recipe,
            "layers": {name: layer.to_dict() for name, layer in self.layers.items()},
        }
        if self.attention:
            data["attention"] = self.attention.to_dict()
        return {**data, "folded": list(self.folded)} if self.folded else data

    @classmethod
    def from_dict(cls, data: Any) -> "Record":
        """Inverse of `to_dict`; reads the layouts before this one too.

        Raises:
            CheckpointError: a newer layout, a field missing, unknown or not what it must be.
        """
        what = "the checkpoint's quantization_config"
        version = data.get("version") if isinstance(data, dict) else None
        if not _is_int(version) or version < 1:  # type: ignore[operator]
            raise CheckpointError(f"{what} names no version")
        if version > VERSION:  # type: ignore[operator]
            raise CheckpointError(
                f"the checkpoint is of layout {shown(version)}, this qtk reads up to {VERSION}; "
                "install a newer qtk"
            )
        checked(data, what, RECORD, ("layers",))
        attention = data.get("attention")
        if not (data["layers"] or attention):
            raise CheckpointError(f"{what} lists no layers")
        recipe = checked(data.get("recipe", {}), f"{what}, recipe", RECIPE)
        if recipe.get("learning") is not None:
            checked(recipe["learning"], f"{what}, learning", LEARNING, (*LEARNING,))
        if attention is not None:
            checked(attention, f"{what}, attention", ATTENTION, tuple(ATTENTION))
        try:
            scheme = None if attention is None else AttentionScheme.from_dict(attention)
        except SchemeError as error:
            raise CheckpointError(f"{what} describes attention badly: {str(error)[:200]}") from None
        layers = {name: Layer.from_dict(layer, name) for name, layer in data["layers"].items()}
        folded = tuple(data.get("folded", ()))
        return cls(layers, recipe, data.get("backend", "auto"), scheme, folded)
