"""What a suite is made of: names of groups and of parts, and the budgets that levels stand for."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

from qtk.discover import available, load
from qtk.errors import SchemeError
from qtk.robust.corrupt import names as corruptions

ATTACK, SYSTEM = "robust.attack", "robust.system"
STANDARD = ("noise", "fgsm", "pgd_linf", "pgd_l2", "pgd_l1", "mim", "ddn", "apgd_ce", "apgd_dlr",
            "square")  # fmt: skip
TEXT = ("embedding_pgd", "character_noise", "word_noise")
FIRST = "apgd_ce"  # what it has wrong the other attacks may spare
GRID = "grid"  # decoders, resizers and colours in every combination
GROUPS = ("attacks", "text", "corruptions", "system", GRID)
LEVELS = ("small", "mid", "large")
IMAGENET = 3 * 224 * 224  # numbers of the images that RobustART's budgets are meant for
LINF = {"small": 0.5 / 255, "mid": 2 / 255, "large": 8 / 255}
L2 = {"small": 0.5, "mid": 2.0, "large": 8.0}
L1 = {"small": 100.0, "mid": 400.0, "large": 1600.0}
FIXED = {
    "side": {"small": 0.15, "mid": 0.25, "large": 0.4},
    "token": {"small": 0.05, "mid": 0.2, "large": 0.5},
    "rate": {"small": 0.1, "mid": 0.2, "large": 0.4},
}

Budgets = Sequence[str] | Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Part:
    """One attack with the budgets to try, by level."""

    name: str
    module: ModuleType
    budgets: Mapping[str, float]

    @property
    def norm(self) -> str:
        return str(self.module.NORM)

    @property
    def is_universal(self) -> bool:
        return bool(getattr(self.module, "UNIVERSAL", False))

    def vanishes(self, level: str) -> bool:
        """Whether nothing is left of it in images of whole steps of 1/255."""
        return self.norm == "linf" and self.budgets[level] < 1 / 255


@dataclass(frozen=True)
class Suite:
    """Names of what is to be run, by room."""

    attacks: tuple[str, ...]
    corruptions: tuple[str, ...]
    system: tuple[str, ...]
    grid: bool

    @property
    def is_text(self) -> bool:
        return any(name in TEXT for name in self.attacks)

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.attacks, *self.corruptions, *self.system, *([GRID] if self.grid else []))


def suite_of(given: str | Sequence[str]) -> Suite:
    """Groups and names, sorted out, each once.

    Raises:
        SchemeError: a name that there is not, none at all, or text and images together.
    """
    items = [given] if isinstance(given, str) else list(given)
    rooms = {"attacks": available(ATTACK), "corruptions": list(corruptions()),
             "system": available(SYSTEM)}  # fmt: skip
    groups = {"attacks": STANDARD, "text": TEXT, "corruptions": rooms["corruptions"],
              "system": rooms["system"], GRID: (GRID,)}  # fmt: skip
    names = list(dict.fromkeys(name for item in items for name in groups.get(item, (item,))))
    known = [name for room in rooms.values() for name in room]
    wrong = [name for name in names if name not in (*known, GRID)]
    if wrong or not names:
        raise SchemeError(
            f"suite={wrong[0] if wrong else items!r}: choose among the groups "
            f"{', '.join(groups)}, or among {', '.join(known)}"
        )
    text = [name for name in names if name in TEXT]
    if text and len(text) < len(names):
        raise SchemeError(f"suite: {text[0]} is for text, {(set(names) - set(text)).pop()} is not")
    parts = {room: tuple(n for n in names if n in known) for room, known in rooms.items()}
    return Suite(**parts, grid=GRID in names)


def parts_of(names: Sequence[str], budgets: Budgets, size: int) -> list[Part]:
    """Attacks with their budgets.

    Args:
        names: of files in robust/attack.
        budgets: levels, of RobustART (l2 and l1 scaled to images of `size` numbers); or
            {norm: budgets}.

    Raises:
        SchemeError: a level or budget that there is not.
    """
    found = []
    for name in names:
        module = load(ATTACK, name)
        found.append(Part(name, module, _budgets(str(module.NORM), budgets, size)))
    return [part for part in found if part.budgets]


def _budgets(norm: str, budgets: Budgets, size: int) -> dict[str, float]:
    if isinstance(budgets, Mapping):
        values = [float(v) for v in budgets.get(norm, ())]
        if any(not math.isfinite(v) or v <= 0 for v in values):
            raise SchemeError(f"budgets[{norm!r}]={values}: give numbers above zero")
        return {_called(norm, v): v for v in values}
    wrong = [level for level in budgets if level not in LEVELS]
    if wrong or isinstance(budgets, str):
        raise SchemeError(f"budgets={budgets!r}: choose among {LEVELS}, or give {{norm: budgets}}")
    share = size / IMAGENET
    tables = {
        "linf": LINF, "l2": {k: v * share**0.5 for k, v in L2.items()},
        "l1": {k: v * share for k, v in L1.items()}, **FIXED,
    }  # fmt: skip
    return {level: tables[norm][level] for level in budgets}


def _called(norm: str, value: float) -> str:
    return f"{norm} {value * 255:.3g}/255" if norm == "linf" else f"{norm} {value:.3g}"
