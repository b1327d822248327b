"""Does an assessor's ranking survive rounding? Both against the truth, and against each other."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from qtk.errors import CalibrationError
from qtk.intervals import DRAWS, Figure
from qtk.physical.scores import attention, score
from qtk.report import page
from qtk.table import finite, markdown, ruled

HEAD = ["figure", "float", "quantized", "difference", "95 %", "floor"]
BATCH = 250
Scores = np.ndarray  # [N]


@dataclass(frozen=True)
class Assessment:
    """What rounding did to an assessor of naturalness.

    Attributes:
        figures: SROCC (Spearman), PLCC (Pearson), RMSE with the truth; correlation of the map of
            attention with the map of gazes, where one was given.
        agreement: SROCC between the two assessors.
    """

    figures: tuple[Figure, ...]
    agreement: float
    samples: int
    seed: int
    gradients: str = "none"
    title: ClassVar[str] = "Assessor of naturalness"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return finite(asdict(self))

    def table(self) -> str:
        """Plain text."""
        return "\n".join([*ruled(HEAD, self._cells()), "", self._remark()])

    def markdown(self) -> str:
        """The same in Markdown."""
        return "\n".join([*markdown(HEAD, self._cells()), "", self._remark(), ""])

    def html(self) -> str:
        """The same for a page (`qtk.trust_page`)."""
        return page.table(HEAD, self._cells()) + page.paragraph(self._remark())

    def _remark(self) -> str:
        return f"SROCC of the two with each other {self.agreement:.4f}, {self.samples} images"

    def _cells(self) -> list[list[str]]:
        return [
            [f.name, f"{f.on_float:.4f}", f"{f.on_quantized:.4f}", f"{f.difference:+.4f}",
             f"{f.low:+.4f} to {f.high:+.4f}", "-" if f.floor is None else f"{f.floor:.4f}"]
            for f in self.figures
        ]  # fmt: skip


def assess(
    model: nn.Module, qmodel: nn.Module, images: Tensor, truth: Tensor, gaze: Tensor | None = None,
    *, second: nn.Module | None = None, seed: int = 0,
) -> Assessment:  # fmt: skip
    """Float and quantized assessor on images [N, 3, H, W] whose naturalness [N] is known.

    Args:
        gaze: [N, H, W], where people look.
        second: quantized with another calibration seed: the floor of every difference.

    Raises:
        CalibrationError: fewer than three images, or as many figures of something else.
        ModelError: an assessor without five classes.
    """
    if len(images) < 3 or truth.shape != (len(images),):
        raise CalibrationError(
            f"{len(images)} images and naturalness {list(truth.shape)}: give three or more, and a "
            "figure for each"
        )
    models = [model, qmodel, *([] if second is None else [second])]
    known = truth.double().numpy()
    scores = [scored(one, images) for one in models]
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(known), (DRAWS, len(known)))
    figures = [
        _figure(name, measure, [(own, known) for own in scores], draws)
        for name, measure in (("SROCC", spearman), ("PLCC", pearson), ("RMSE", rmse))
    ]
    if gaze is not None:
        maps = [looked(one, images) for one in models]
        alike = [map_correlation(own, gaze).numpy() for own in maps]
        figures.append(_figure("map and gaze", _mean, [(own, known) for own in alike], draws))
    return Assessment(tuple(figures), spearman(scores[0], scores[1]), len(images), seed)


def _figure(
    name: str, measure: Callable[[Scores, Scores], float], pairs: Sequence[tuple[Scores, Scores]],
    draws: np.ndarray,
) -> Figure:  # fmt: skip
    values = [measure(*pair) for pair in pairs]
    (a, known), (b, _) = pairs[:2]
    apart = [measure(b[i], known[i]) - measure(a[i], known[i]) for i in draws]
    low, high = np.quantile(apart, [0.025, 0.975])
    floor = abs(values[2] - values[1]) if len(values) > 2 else None
    return Figure(name, values[0], values[1], float(low), float(high), floor)


@torch.no_grad()
def scored(model: nn.Module, images: Tensor) -> Scores:
    """[N] float64."""
    return torch.cat([score(model, part) for part in images.split(BATCH)]).double().numpy()


@torch.no_grad()
def looked(model: nn.Module, images: Tensor) -> Tensor:
    """[N, H, W]"""
    return torch.cat([attention(model, part) for part in images.split(BATCH)])


def map_correlation(maps: Tensor, others: Tensor) -> Tensor:
    """Pearson's of each [N, H, W] with its like; 0 where one is constant. [N]"""
    a, b = (m.flatten(1).double() - m.flatten(1).double().mean(1, keepdim=True)
            for m in (maps, others))  # fmt: skip
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-12)


def spearman(a: Scores, b: Scores) -> float:
    """Correlation of ranks, ties sharing their mean."""
    return pearson(ranks(a), ranks(b))


def ranks(values: Scores) -> Scores:
    """[N], from 0; equal values have the mean of their places."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts + 1) / 2)[inverse]


def pearson(a: Scores, b: Scores) -> float:
    """Correlation; 0 where one is constant."""
    a, b = a - a.mean(), b - b.mean()
    length = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum() / length) if length else 0.0


def rmse(a: Scores, b: Scores) -> float:
    return float(np.sqrt(np.square(a - b).mean()))


def _mean(a: Scores, _: Scores) -> float:
    return float(a.mean())
