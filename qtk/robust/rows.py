"""From who was right to rows: every attack, every transfer, and the worst case of each image."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
from torch import nn

from qtk.robust import corruptions, noises
from qtk.robust.cells import UNSEEN, Bits, Found
from qtk.robust.images import Images
from qtk.robust.result import UNROUNDED, Row, compare, worst_of
from qtk.robust.study import ADAPTIVE, FLOAT, QUANTIZED, SECOND, Study, makers
from qtk.robust.suite import FIRST, Part, Suite

Crafted = dict[tuple[str, str, str], Found]  # attack, level, maker
Pair = tuple[Bits, Bits]


def attacked(
    study: Any, parts: Sequence[Part], seed: int, thorough: bool = True
) -> tuple[list[Row], dict[str, float], Crafted]:
    """Rows on clean data and under every attack, what two calibration seeds differ by, and who was
    right on what.

    Budgets below one step of 1/255 vanish when images are rounded: their rows are of unrounded
    images. All other levels have rows of both.

    Args:
        study: a `Study` or `TextStudy`.
        thorough: attacks every image with everything, also what FIRST has wrong already.
    """
    crafted = _crafted(study, parts, thorough)
    clean = study.clean()
    base = clean[FLOAT], clean[QUANTIZED]
    rows, floors = [compare("clean", "clean", "", None, base, base, seed)], {"clean": 0.0}
    if SECOND in clean:
        floors["clean"] = _apart(clean[QUANTIZED], clean[SECOND])
    for prefix in _prefixes(parts):
        for part in parts:
            for level, budget in part.budgets.items():
                if prefix == "" and part.vanishes(level):
                    continue
                found = {m: crafted[part.name, level, m] for m in makers(study.models)}
                for kind, name, bits in _pairs(part, found, prefix):
                    rows.append(compare(name, kind, prefix + level, budget, bits, base, seed))
                if SECOND in found:
                    kind = _kind(part)
                    gap = _apart(found[QUANTIZED][prefix + QUANTIZED],
                                 found[SECOND][prefix + SECOND])  # fmt: skip
                    floors[kind] = max(floors.get(kind, 0.0), gap)
        rows += _worst(parts, crafted, prefix, base, seed)
    if SECOND not in clean:
        return rows, {}, crafted
    if "attack" in floors:
        floors |= dict.fromkeys(("transfer", "worst"), floors["attack"])
    return [replace(row, floor=floors.get(row.kind)) for row in rows], floors, crafted


def _crafted(study: Any, parts: Sequence[Part], thorough: bool) -> Crafted:
    found: Crafted = {}
    for part in sorted(parts, key=lambda part: part.name != FIRST):
        for level, maker in product(part.budgets, makers(study.models)):
            after = found.get((FIRST, level, maker))
            if thorough or after is None or _kind(part) == "noise" or part.is_universal:
                found[part.name, level, maker] = study.attack(part, level, maker)
            else:
                found[part.name, level, maker] = study.attack(part, level, maker, after=after)
    return found


def disturbed(
    study: Study, models: dict[str, nn.Module], suite: Suite, severities: Sequence[int], seed: int
) -> tuple[list[Row], dict[str, float]]:
    """Rows under corruptions and system noise, and what two calibration seeds differ by there."""
    clean, rows = study.clean(), []
    floors: dict[str, float] = {}
    for heard in (
        *corruptions.heard(study, suite.corruptions, severities),
        *noises.heard(study, models, suite.system),
        *(noises.grid(study) if suite.grid else ()),
    ):
        bits, base = ((found[FLOAT], found[QUANTIZED]) for found in (heard.found, clean))
        rows.append(compare(heard.name, heard.kind, heard.level, heard.budget, bits, base, seed))
        if SECOND in clean:
            gap = _apart(heard.found[QUANTIZED], heard.found[SECOND])
            floors[heard.kind] = max(floors.get(heard.kind, 0.0), gap)
    return [replace(row, floor=floors.get(row.kind)) for row in rows], floors


def notes_on(images: Images, suite: Suite, thorough: bool) -> tuple[str, ...]:
    """What was done to the images before anything was done to them, and what was not."""
    factor, notes = corruptions.factor_of(images.pixels), []
    if not thorough and FIRST in suite.attacks:
        notes.append(
            f"rows of the other attacks are of {FIRST} and of them: what it has wrong, rounded and "
            "not and whoever answers, was spared"
        )
    if suite.corruptions and factor > 1:
        notes.append(
            f"corrupted at {factor} times their size (bicubic) and averaged back: ImageNet-C's "
            f"constants are meant for 224 pixels; row {corruptions.RESIZED!r} is that alone"
        )
    if "resize" in suite.system or suite.grid:
        notes.append(
            f"pictures no larger than the model's input come to the resizers {noises.ENLARGED} "
            "times as large (Lanczos), so that there is something to shrink"
        )
    return tuple(notes)


def _pairs(part: Part, found: Mapping[str, Found], prefix: str) -> list[tuple[str, str, Pair]]:
    """Each model under what was crafted on it, on the other, and on all its precisions."""
    floats, quantized = prefix + FLOAT, prefix + QUANTIZED
    own = found[FLOAT][floats], found[QUANTIZED][quantized]
    pairs = [(_kind(part), part.name, own)]
    if part.module.GRADIENTS:
        swapped = found[QUANTIZED][floats], found[FLOAT][quantized]
        pairs.append(("transfer", f"{part.name}, from the other model", swapped))
        if ADAPTIVE in found:
            adaptive = found[FLOAT][floats], found[ADAPTIVE][quantized]
            pairs.append(("adaptive", f"{part.name}, over precisions", adaptive))
    return pairs


def _worst(
    parts: Sequence[Part], crafted: Crafted, prefix: str, base: Pair, seed: int
) -> list[Row]:
    """Of each level, right under every row; a patch, which is seen by half of the images, apart."""
    rows = []
    usual = [part for part in parts if not part.is_universal]
    for level in dict.fromkeys(level for part in usual for level in part.budgets):
        sides = []
        for role in (FLOAT, QUANTIZED):
            bits = [
                found[prefix + role]
                for part in usual if level in part.budgets
                if prefix or not part.vanishes(level)
                for (name, at, _), found in crafted.items()
                if (name, at) == (part.name, level) and prefix + role in found
            ]  # fmt: skip
            sides.append(worst_of(bits) if bits else None)
        first, second = sides
        if first is not None and second is not None:
            pair = first, second
            rows.append(compare("worst case", "worst", prefix + level, None, pair, base, seed))
    return rows


def _prefixes(parts: Sequence[Part]) -> tuple[str, ...]:
    """Rounded and unrounded; what is not of pixels has one row."""
    return ("", UNROUNDED) if any(part.module.INPUT == "pixels" for part in parts) else ("",)


def _kind(part: Part) -> str:
    return "noise" if part.module.INPUT == "pixels" and part.name == "noise" else "attack"


def _apart(a: Bits, b: Bits) -> float:
    seen = (a != UNSEEN) & (b != UNSEEN)
    return abs(float(np.mean(a[seen])) - float(np.mean(b[seen])))
