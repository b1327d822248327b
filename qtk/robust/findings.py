"""What RobustMQ (Xiao et al. 2023, arXiv 2308.02350) found of networks trained in few bits, as
questions to what was measured here. Whichever way they come out, they come out of the rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from qtk.robust.result import NOISES, Robustness, Row

HARD, EASY = ("impulse_noise", "glass_blur"), "brightness"
NEAREST = ("pillow nearest", "opencv nearest")
UNKNOWN = "not measured"


@dataclass(frozen=True)
class Finding:
    """A claim, and what is seen of it.

    Attributes:
        holds: None where what it speaks of was not measured, or cannot be told apart.
    """

    claim: str
    holds: bool | None
    told: str


def findings(studies: Mapping[str, Robustness]) -> list[Finding]:
    """The four of the abstract.

    Args:
        studies: by the name of the quantized model, of one float model.
    """
    return [_attacks(studies), _noises(studies), _by_bits(studies), _corruptions(studies),
            _resizers(studies)]  # fmt: skip


def _attacks(studies: Mapping[str, Robustness]) -> Finding:
    claim = "quantized models are more robust to attacks than the float one"
    masked = [name for name, study in studies.items() if not study.is_conclusive]
    if masked:
        return Finding(claim, None, f"{', '.join(masked)}: {studies[masked[0]].conclusion}")
    return _signs(claim, {
        f"{name}, {row.level}": row
        for name, study in studies.items() for row in study.rows if row.kind == "worst"
    }, better=True)  # fmt: skip


def _noises(studies: Mapping[str, Robustness]) -> Finding:
    claim = "quantized models are weaker under corruptions and system noise"
    told, signs = [], []
    for name, study in studies.items():
        for kind, facts in study.summary().items():
            if kind in NOISES:
                lost, floor = facts["amplification"], study.floor.get(kind, 0.0)
                told.append(f"{name}, {kind}: {_points(-lost)}")
                signs.append(0 if abs(lost) <= floor else np.sign(lost))
    return _voted(claim, signs, told)


def _by_bits(studies: Mapping[str, Robustness]) -> Finding:
    claim = "with more bits, robustness to attacks falls, and that to noise rises"
    by_bits = sorted((s.bits, name) for name, s in studies.items() if s.bits is not None)
    if len({bits for bits, _ in by_bits}) < 2:
        return Finding(claim, None, f"{UNKNOWN}: give models of several bit widths")
    ordered = [studies[name] for _, name in by_bits]
    trends: dict[str, list[float]] = {}
    for study in ordered:
        worst = [r.difference for r in study.rows if r.kind == "worst"]
        if worst:
            trends.setdefault("attacks", []).append(float(np.mean(worst)))
        for kind, facts in study.summary().items():
            if kind in NOISES:
                trends.setdefault(kind, []).append(-facts["amplification"])
    told = [
        f"{what} at {', '.join(f'{b:g}' for b, _ in by_bits)} bits: "
        f"{', '.join(_points(v) for v in values)}" for what, values in trends.items()
    ]  # fmt: skip
    wanted = [
        _monotone([-v for v in values] if what == "attacks" else values)
        for what, values in trends.items()
        if len(values) == len(ordered) and max(values) - min(values) > _floor(ordered, what)
    ]
    return Finding(claim, all(wanted) if wanted else None, "; ".join(told) or UNKNOWN)


def _corruptions(studies: Mapping[str, Robustness]) -> Finding:
    claim = "impulse noise and glass blur hurt most, brightness least"
    means = _means(studies, "corruption", lambda row: row.name)
    if not {*HARD, EASY} <= set(means):
        return Finding(claim, None, UNKNOWN)
    order = sorted(means, key=lambda name: means[name])
    told = (
        f"worst {', '.join(_share(means, n) for n in order[:3])}; "
        f"least {', '.join(_share(means, n) for n in order[-3:])}"
    )
    return Finding(claim, {*order[:2]} == {*HARD} and order[-1] == EASY, told)


def _resizers(studies: Mapping[str, Robustness]) -> Finding:
    claim = "of the resizers nearest neighbour is worst"
    means = _means(studies, "system", lambda row: row.level if row.name == "resize" else "")
    means.pop("", None)
    if not any(name in means for name in NEAREST):
        return Finding(claim, None, UNKNOWN)
    order = sorted(means, key=lambda name: means[name])
    told = f"worst {', '.join(_share(means, n) for n in order[:3])}"
    return Finding(claim, order[0] in NEAREST, told)


def _means(studies: Mapping[str, Robustness], kind: str, key: Any) -> dict[str, float]:
    """Accuracy of the quantized models, mean over them and over severities."""
    found: dict[str, list[float]] = {}
    for study in studies.values():
        for row in study.rows:
            if row.kind == kind:
                found.setdefault(key(row), []).append(row.accuracy_quantized)
    return {name: float(np.mean(values)) for name, values in found.items()}


def _signs(claim: str, rows: Mapping[str, Row], better: bool) -> Finding:
    """A difference counts where its interval leaves zero out and it is beyond the floor."""
    signs = []
    for row in rows.values():
        clear = (row.low > 0 or row.high < 0) and not row.says_nothing
        signs.append(np.sign(row.difference) * (1 if better else -1) if clear else 0)
    told = [f"{name}: {_points(row.difference)}" for name, row in rows.items()]
    return _voted(claim, signs, told)


def _voted(claim: str, signs: Sequence[Any], told: Sequence[str]) -> Finding:
    if not signs:
        return Finding(claim, None, UNKNOWN)
    words = "; ".join(told)
    if not any(signs):
        return Finding(claim, None, f"no difference that could be told apart: {words}")
    return Finding(claim, all(sign > 0 for sign in signs if sign), words)


def _floor(studies: Sequence[Robustness], what: str) -> float:
    """Spans below it are no trend."""
    kind = "worst" if what == "attacks" else what
    return max(study.floor.get(kind, 0.0) for study in studies)


def _monotone(values: Sequence[float]) -> bool:
    return all(a <= b for a, b in pairwise(values)) and values[0] < values[-1]


def _points(difference: float) -> str:
    return f"{100 * difference:+.1f} points"


def _share(means: Mapping[str, float], name: str) -> str:
    return f"{name} {100 * means[name]:.1f} %"
