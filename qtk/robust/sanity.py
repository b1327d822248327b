"""Ways in which an attack that is too weak gives itself away (Carlini et al. 2019, arXiv
1902.06705; Athalye et al. 2018, arXiv 1802.00420).

A model that merely hides its gradients looks robust to the attacks that need them. It is not where
random noise or a transferred attack does better, where more steps do worse, or where a budget that
destroys the image does not destroy the answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from qtk.discover import load
from qtk.robust.cells import Bits, Found
from qtk.robust.images import Images
from qtk.robust.result import UNROUNDED, Check, worst_of
from qtk.robust.study import FLOAT, QUANTIZED, Study
from qtk.robust.suite import Part

WITNESS = "apgd_ce"  # ours, so that the checks need no extra
ENORMOUS = 64 / 255
SAMPLES = 64  # of the checks that craft anew
POINT = 0.01  # that a figure may be off
AGREEMENT = 0.995
Crafted = Mapping[tuple[str, str, str], Found]  # attack, level, maker


def checks(study: Study, parts: Sequence[Part], crafted: Crafted) -> list[Check]:
    """All of them, for the float and the quantized model."""
    few = _few(study)
    found = []
    for role in (FLOAT, QUANTIZED):
        other = FLOAT if role == QUANTIZED else QUANTIZED
        found += [
            _agreement(study, role), _enormous(few, role), _more_steps(few, role),
            _transfer(parts, crafted, role, other), _beats(parts, crafted, role, "noise"),
            _beats(parts, crafted, role, "square"),
        ]  # fmt: skip
    return found


def _few(study: Study) -> Study:
    images = study.images
    n = min(SAMPLES, len(images.labels))
    first = Images(images.pixels[:n], images.labels[:n], images.mean, images.std)
    return replace(study, images=first, cells=study.cells.within("sanity"))


def _agreement(study: Study, role: str) -> Check:
    """The pass that is differentiated answers as the one that is scored."""
    model, same, n = study.models[role], 0, len(study.images.labels)
    for x in study.images.pixels.split(study.batch_size):
        with torch.no_grad():
            scored = model(x).argmax(-1)
        with torch.enable_grad():
            same += int((model(x.clone().requires_grad_()).argmax(-1) == scored).sum())
    told = f"{100 * same / n:.2f} % of answers are the same with and without gradients"
    return Check("same answers", role, same >= AGREEMENT * n, told)


def _enormous(few: Study, role: str) -> Check:
    part = Part(WITNESS, load("robust.attack", WITNESS), {"enormous": ENORMOUS})
    left = float(few.attack(part, "enormous", role)[UNROUNDED + role].mean())
    told = f"{100 * left:.1f} % are right at {ENORMOUS * 255:.0f}/255, where none should be"
    return Check("enormous budget", role, left == 0, told)


def _more_steps(few: Study, role: str) -> Check:
    part = Part(WITNESS, load("robust.attack", WITNESS), {"mid": 2 / 255})
    once, twice = (
        float(few.attack(part, "mid", role, steps)[UNROUNDED + role].mean())
        for steps in (few.steps, 2 * few.steps)
    )
    told = f"{100 * once:.1f} % are right after {few.steps} steps, {100 * twice:.1f} % after twice"
    return Check("more steps", role, twice <= once + _slack(len(few.images.labels)), told)


def _transfer(parts: Sequence[Part], crafted: Crafted, role: str, other: str) -> Check:
    """What is crafted on a model is no weaker than what is crafted on the other one.

    Of each level the strongest of the attacks with gradients counts for each image.
    """
    title, gaps = "white box against transfer", {}
    for level in dict.fromkeys(level for part in parts for level in part.budgets):
        names = [
            part.name
            for part in parts
            if part.module.GRADIENTS and not part.is_universal and level in part.budgets
        ]
        if names:
            own, foreign = (
                worst_of([crafted[name, level, maker][UNROUNDED + role] for name in names]).mean()
                for maker in (role, other)
            )  # fmt: skip
            gaps[level] = float(own), float(foreign)
    if not gaps:
        return Check(title, role, None, "no attack with gradients was run")
    level = max(gaps, key=lambda at: gaps[at][0] - gaps[at][1])
    own, foreign = gaps[level]
    told = (
        f"{level}: {100 * own:.1f} % are right under what is crafted on the model itself, "
        f"{100 * foreign:.1f} % under what is crafted on the other"
    )
    size = len(next(iter(crafted.values()))[UNROUNDED + role])
    return Check(title, role, own - foreign <= _slack(size), told)


def _beats(parts: Sequence[Part], crafted: Crafted, role: str, name: str) -> Check:
    """Gradients do better than what has none."""
    title = f"gradients against {name}"
    strongest = _strongest(parts, crafted, role)
    blind = next((part for part in parts if part.name == name), None)
    levels = [] if blind is None else [level for level in blind.budgets if level in strongest]
    if not levels:
        return Check(title, role, None, f"{name}, or an linf attack with gradients, was not run")
    gaps = {
        level: float(strongest[level].mean() - crafted[name, level, role][UNROUNDED + role].mean())
        for level in levels
    }
    level = max(gaps, key=lambda at: gaps[at])
    own = strongest[level]
    told = (
        f"{level}: {100 * own.mean():.1f} % are right with gradients, "
        f"{100 * (own.mean() - gaps[level]):.1f} % under {name}"
    )
    return Check(title, role, gaps[level] <= _slack(len(own)), told)


def _strongest(parts: Sequence[Part], crafted: Crafted, role: str) -> dict[str, Bits]:
    """Of the linf attacks with gradients, by level."""
    found: dict[str, Bits] = {}
    for part in parts:
        if part.module.GRADIENTS and part.norm == "linf":
            for level in part.budgets:
                bits = crafted[part.name, level, role][UNROUNDED + role]
                if level not in found or bits.mean() < found[level].mean():
                    found[level] = bits
    return found


def _slack(samples: int) -> float:
    """A point, or a sample where that is more."""
    return max(POINT, 1 / samples) + 1e-9
