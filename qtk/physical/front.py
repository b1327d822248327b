"""Success against naturalness: points, fronts, and how they are shown."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from qtk.intervals import wilson
from qtk.report import page, picture
from qtk.table import finite, markdown, ruled

HEAD = ["patch", "weight", "float fooled", "95 %", "quantized fooled", "95 %", "assessor", "judge",
        "formula"]  # fmt: skip
FRONTS = ["judged by", "crafted on", "seen by", "hypervolume", "95 %"]
CONTROLS = ("unlearned noise", "mean colour")
PROXY = "naturalness is a proxy: the judge learned what a formula says of patches, 1 to 5"
FACTOR = 3  # of the contact sheet


@dataclass(frozen=True)
class Point:
    """One patch on the test images.

    Attributes:
        crafted: on "float" or "quantized", with naturalness of this `weight`; or a control.
        lost: of `right` images that the float model has right without the patch, those it has not
            with it; `lost_quantized`, `right_quantized` likewise.
        assessor: mean score by the one attacked; `judge` by another, `formula` by the truth.
    """

    crafted: str
    weight: float
    lost: int
    right: int
    lost_quantized: int
    right_quantized: int
    assessor: float
    judge: float
    formula: float


@dataclass(frozen=True)
class Front:
    """The share of (success, naturalness) that patches of one model reach on another.

    Attributes:
        judge: who says what is natural, "judge" or "formula"; crafted, reader: the models.
        volume: area below the front, from no success and the score 1, over that of full success and
            the score 5; `low` to `high` 95 % of paired bootstrap draws over images.
    """

    judge: str
    crafted: str
    reader: str
    volume: float
    low: float
    high: float


@dataclass(frozen=True)
class Naturalness:
    """What patches that look natural do to both models.

    Attributes:
        points: controls, and a patch for each model and weight.
        fronts: for each judge, who crafted and who saw.
        differences: of hypervolumes to the float model's own.
        pictures: [points, n, 3, H, W], the first test images with each patch.
    """

    points: tuple[Point, ...]
    fronts: tuple[Front, ...]
    differences: tuple[Front, ...]
    pictures: Tensor
    samples: int
    side: int
    seed: int
    seconds: float
    gradients: str = "straight-through"
    title: ClassVar[str] = "Naturalness of patches"

    @property
    def pareto(self) -> dict[str, list[tuple[float, float]]]:
        """(success, naturalness by the judge) of each weight: "float on quantized" and so on."""
        found: dict[str, list[tuple[float, float]]] = {}
        for point in self.points:
            if point.crafted not in CONTROLS:
                for reader, share in (("float", point.lost / max(point.right, 1)),
                                      ("quantized", point.lost_quantized
                                       / max(point.right_quantized, 1))):  # fmt: skip
                    line = found.setdefault(f"{point.crafted} on {reader}", [])
                    line.append((share, point.judge))
        return found

    def to_dict(self) -> dict[str, Any]:
        """For JSON, without the pictures."""
        told = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "pictures"}
        lists = ("points", "fronts", "differences")
        told |= {name: [asdict(each) for each in told[name]] for name in lists}
        return finite({**told, "pareto": self.pareto})

    def table(self) -> str:
        """Plain text: patches, and hypervolumes."""
        parts = [*ruled(HEAD, self._points()), "", *ruled(FRONTS, self._fronts()), ""]
        return "\n".join([*parts, *self._remarks()])

    def markdown(self) -> str:
        """The same in Markdown."""
        parts = [*markdown(HEAD, self._points()), "", *markdown(FRONTS, self._fronts()), ""]
        return "\n".join([*parts, *(f"{remark}\n" for remark in self._remarks())])

    def html(self) -> str:
        """The same for a page (`qtk.trust_page`), with the contact sheet."""
        shown = picture.inline(self.contact_sheet(), "test images, a line a patch")
        lines = ", ".join(_name(point) for point in self.points)
        tables = page.table(HEAD, self._points()), page.table(FRONTS, self._fronts())
        figure = page.figure(shown, f"The first test images, a line a patch: {lines}.")
        return "\n".join([*tables, figure, *map(page.paragraph, self._remarks())])

    def contact_sheet(self, file: str | Path | None = None) -> Tensor:
        """[3, H', W'], the first test images, a line a point; written as PNG to `file`."""
        made = picture.sheet(list(self.pictures), FACTOR)
        if file is not None:
            picture.write(made, file)
        return made

    def _points(self) -> list[list[str]]:
        return [
            [p.crafted, f"{p.weight:g}", *_share(p.lost, p.right),
             *_share(p.lost_quantized, p.right_quantized), f"{p.assessor:.2f}", f"{p.judge:.2f}",
             f"{p.formula:.2f}"]
            for p in self.points
        ]  # fmt: skip

    def _fronts(self) -> list[list[str]]:
        plain = [[f.judge, f.crafted, f.reader, f"{f.volume:.4f}", f"{f.low:.4f} to {f.high:.4f}"]
                 for f in self.fronts]  # fmt: skip
        return [*plain, *(
            [f.judge, f.crafted, f.reader,
             "no difference" if f.low <= 0 <= f.high else f"{f.volume:+.4f}",
             f"{f.low:+.4f} to {f.high:+.4f}"]
            for f in self.differences
        )]  # fmt: skip

    def _remarks(self) -> list[str]:
        return [
            "fooled: % of the images that are right without a patch; gradients straight-through, "
            "scored without",
            f"{self.samples} images, patches of {self.side} pixels; {PROXY}",
        ]


def hypervolume(success: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """[draws, points] shares and scores in 1 to 5 -> [draws], area of what some point reaches."""
    order = np.argsort(-success, 1)
    share = np.take_along_axis(success, order, 1)
    best = np.maximum.accumulate((np.take_along_axis(scores, order, 1) - 1) / 4, 1)
    next_share = np.concatenate([share[:, 1:], np.zeros((len(share), 1))], 1)
    area: np.ndarray = ((share - next_share) * best).sum(1)
    return area


def _name(point: Point) -> str:
    if point.crafted in CONTROLS:
        return point.crafted
    return f"{point.crafted}, weight {point.weight:g}"


def _share(hits: int, samples: int) -> Sequence[str]:
    low, high = wilson(hits, samples)
    return f"{100 * hits / max(samples, 1):.1f}", f"{100 * low:.1f} to {100 * high:.1f}"
