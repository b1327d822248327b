"""What to quantize to: how many bits, on which grid, sharing one scale over what."""

from dataclasses import asdict, dataclass
from typing import Any

from qtk.errors import SchemeError

WEIGHT_BITS = (2, 3, 4, 5, 6, 7, 8)
ACTIVATION_BITS = (4, 5, 6, 7, 8)
GRANULARITIES = ("tensor", "channel", "token", "group")
FLOAT = 16  # bits=16 stands for "left in floating point"
FP8 = "fp8"  # in place of bits: e4m3, one sign, four bits of exponent, three of mantissa
KINDS = ("int", "e4m3")


@dataclass(frozen=True)
class Format:
    """One grid of eight bits or fewer.

    Attributes:
        bits: width of a code.
        symmetric: no zero point. Either way all 2**bits codes are used.
        granularity: what shares a scale: "tensor", "channel" (a row of W), "token", "group".
        group_size: length of a group along the input channels, for "group" only.
        kind: "int", or "e4m3" whose codes are the bytes of such floats.
    """

    bits: int
    symmetric: bool = True
    granularity: str = "channel"
    group_size: int | None = None
    kind: str = "int"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SchemeError(f"kind={self.kind!r}: choose from {KINDS}")
        if self.kind != "int" and (self.bits, self.symmetric, self.group_size) != (8, True, None):
            raise SchemeError(f"{self.kind} has 8 bits and neither zero points nor groups")
        size, grouped = self.group_size, self.granularity == "group"
        if not isinstance(self.granularity, str) or self.granularity not in GRANULARITIES:
            raise SchemeError(f"granularity={self.granularity!r}: choose from {GRANULARITIES}")
        if not isinstance(self.symmetric, bool):
            raise SchemeError(f"symmetric={self.symmetric!r}: give True or False")
        if not (is_positive_int(size) if grouped else size is None):
            raise SchemeError(f"group_size={size!r} does not go with {self.granularity!r}")

    @property
    def qmax(self) -> int:
        return 2 ** (self.bits - 1) - 1

    @property
    def qmin(self) -> int:
        return -self.qmax - 1


@dataclass(frozen=True)
class Scheme:
    """How one linear computes: the grid of its weight and of its input, None for floating point."""

    w: Format | None
    a: Format | None

    @classmethod
    def of(
        cls, w: int | str, a: int | str, activations: str = "static", group_size: int | None = None,
        weights: str = "symmetric",
    ) -> "Scheme":  # fmt: skip
        """The scheme that `quantize(w=, a=, activations=, group_size=, weights=)` asks for.

        FP8 weights have scales per channel, FP8 activations dynamic ones per token.

        Raises:
            SchemeError: bits, group size or granularity out of range, or what has no kernel.
        """
        if FP8 in (w, a):
            return cls._of_fp8(w, a, group_size, weights)
        _check_bits("w", w, WEIGHT_BITS)
        _check_bits("a", a, ACTIVATION_BITS)
        w, a = int(w), int(a)
        if activations not in ("static", "token"):
            raise SchemeError(f"activations={activations!r}: choose 'static' or 'token'")
        if group_size is not None and not is_positive_int(group_size):
            raise SchemeError(f"group_size={group_size!r}: give a positive integer, or None")
        if w == FLOAT and a != FLOAT:
            raise SchemeError(
                f"w=16 with a={a}: there is no kernel for float weights and integer activations; "
                "quantize the weights too (w=8), or leave both in floating point"
            )
        if weights not in ("symmetric", "asymmetric"):
            raise SchemeError(f"weights={weights!r}: choose 'symmetric' or 'asymmetric'")
        symmetric, shared = weights == "symmetric", "channel" if group_size is None else "group"
        weight = Format(w, symmetric, shared, group_size)
        tensor = activations == "static"
        activation = Format(a, symmetric=not tensor, granularity="tensor" if tensor else "token")
        return cls(None if w == FLOAT else weight, None if a == FLOAT else activation)._checked()

    @classmethod
    def _of_fp8(cls, w: object, a: object, group_size: int | None, weights: str) -> "Scheme":
        if w != a:
            raise SchemeError(f"w={w!r} with a={a!r}: FP8 weights go with FP8 activations")
        if group_size is not None or weights != "symmetric":
            raise SchemeError(f"{FP8!r} has scales per channel, without groups or zero points")
        return cls(Format(8, kind="e4m3"), Format(8, granularity="token", kind="e4m3"))

    def _checked(self) -> "Scheme":
        if self.w is not None and not self.w.symmetric and self.a is not None:
            raise SchemeError(
                f"asymmetric weights with a={self.a.bits}: an integer product has no place for a "
                "weight's zero point; use weights='symmetric', or a=16"
            )
        return self

    @property
    def name(self) -> str:
        """In words: W4A8, W4A16 g128, W8A8 token."""
        if self.w is None:
            return "float"
        if self.w.kind != "int":
            return "FP8"
        text = f"W{self.w.bits}A{self.a.bits if self.a else FLOAT}"
        if self.w.group_size:
            text += f" g{self.w.group_size}"
        if not self.w.symmetric:
            text += " asymmetric"
        return text + (" token" if self.a and self.a.granularity == "token" else "")

    def to_dict(self) -> dict[str, Any]:
        """For JSON; integers are the kind that is not said."""
        data = asdict(self)
        for fmt in filter(None, data.values()):
            if fmt["kind"] == "int":
                del fmt["kind"]
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Scheme":
        """Inverse of `to_dict`.

        Raises:
            SchemeError: a field is missing, unknown or out of range.
        """
        if not isinstance(data, dict) or set(data) != {"w", "a"}:
            raise SchemeError("a scheme has w and a, and nothing else")
        try:
            w, a = (None if data[key] is None else Format(**data[key]) for key in ("w", "a"))
        except TypeError as error:
            raise SchemeError(f"not a scheme: {error}") from None
        for name, fmt, allowed in (("w", w, WEIGHT_BITS), ("a", a, ACTIVATION_BITS)):
            if fmt is not None and not _is_one_of(fmt.bits, allowed):
                raise SchemeError(f"bits of {name}: choose {allowed[0]} to {allowed[-1]}")
        if w is not None and w.granularity not in ("channel", "group"):
            raise SchemeError(f"weights with one scale a {w.granularity}")
        if a is not None and a.granularity not in ("tensor", "token"):
            raise SchemeError(f"activations with one scale a {a.granularity}")
        if (w is not None and w.kind != "int") != (a is not None and a.kind != "int"):
            raise SchemeError("FP8 weights go with FP8 activations")
        return cls(w, a)._checked()


def is_positive_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check_bits(name: str, bits: object, allowed: tuple[int, ...]) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in (*allowed, FLOAT):
        raise SchemeError(
            f"{name}={bits!r}: choose {allowed[0]} to {allowed[-1]} bits, 16 for floating point, "
            f"or {FP8!r}"
        )


SOFTMAXES = ("float", "uniform", "matthew", "log2", "log-sqrt2", "code")
CODE_STEPS = {5: 1, 6: 2, 7: 4}  # softmax_bits of "code": 5 of exponent, the rest steps an octave


@dataclass(frozen=True)
class AttentionScheme:
    """How attention's two products and its softmax compute.

    Attributes:
        bits: of the codes of q, k and v, None for floating point; fewer than 8 are stored as int8.
            q and k have one dynamic scale per token and head, v a static one per channel.
        softmax: one of SOFTMAXES.
        softmax_bits: of a probability's code, None for floating point.
    """

    bits: int | None = None
    softmax: str = "float"
    softmax_bits: int | None = None

    @classmethod
    def of(
        cls, attention: object, softmax: object, softmax_bits: object, a: int | str
    ) -> "AttentionScheme | None":
        """The scheme that `quantize(attention=, softmax=, softmax_bits=)` asks for, None for none.

        Args:
            a: bits of the linears' activations, which "uniform" and "matthew" take too.

        Raises:
            SchemeError: a name that does not exist, or bits that do not go with it.
        """
        names = {"float": None, **{f"int{bits}": bits for bits in ACTIVATION_BITS[::-1]}}
        if not isinstance(attention, str) or attention not in names:
            raise SchemeError(f"attention={attention!r}: choose {', '.join(map(repr, names))}")
        if not isinstance(softmax, str) or softmax not in SOFTMAXES:
            raise SchemeError(f"softmax={softmax!r}: choose {', '.join(map(repr, SOFTMAXES))}")
        if softmax_bits is None and softmax != "float":
            uniform = 8 if a in (FLOAT, FP8) else a
            softmax_bits = {"log2": 4, "log-sqrt2": 4, "code": 7}.get(softmax, uniform)
        if names[attention] is None and softmax == "float" and softmax_bits is None:
            return None
        return cls.from_dict(
            {"bits": names[attention], "softmax": softmax, "softmax_bits": softmax_bits}
        )

    @property
    def steps(self) -> int:
        """Steps an octave of the logarithmic kinds."""
        if self.softmax == "code" and self.softmax_bits is not None:
            return CODE_STEPS[self.softmax_bits]
        return 2 if self.softmax == "log-sqrt2" else 1

    @property
    def needs_data(self) -> bool:
        """Whether something about it is found on calibration data."""
        return self.bits is not None or self.softmax == "matthew"

    @property
    def name(self) -> str:
        """In words."""
        operands = "float" if self.bits is None else f"int{self.bits}"
        if self.bits is not None and self.bits < 8:
            operands += " (as int8)"
        bits = "" if self.softmax_bits is None else f" {self.softmax_bits}-bit"
        return f"{operands} products, {self.softmax}{bits} softmax"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "AttentionScheme":
        """Inverse of `to_dict`.

        Raises:
            SchemeError: a field is missing, unknown or out of range.
        """
        try:
            scheme = cls(**data)
        except TypeError as error:
            raise SchemeError(f"not an attention scheme: {error}") from None
        if not isinstance(scheme.softmax, str) or scheme.softmax not in SOFTMAXES:
            raise SchemeError(f"softmax={scheme.softmax!r}: choose {', '.join(SOFTMAXES)}")
        if scheme.bits is not None and not _is_one_of(scheme.bits, ACTIVATION_BITS):
            raise SchemeError(f"attention in {scheme.bits!r} bits: choose 4 to 8")
        allowed: tuple[int, ...] = {"float": (), "code": tuple(CODE_STEPS)}.get(
            scheme.softmax, WEIGHT_BITS
        )
        if scheme.softmax == "float" and scheme.softmax_bits is None:
            return scheme
        if not _is_one_of(scheme.softmax_bits, allowed):
            choices = ", ".join(map(str, allowed)) or "none: it stays in floating point"
            raise SchemeError(
                f"softmax_bits={scheme.softmax_bits!r} with softmax={scheme.softmax!r}: choose "
                f"{choices}"
            )
        return scheme


def _is_one_of(bits: object, allowed: tuple[int, ...]) -> bool:
    return isinstance(bits, int) and not isinstance(bits, bool) and bits in allowed
