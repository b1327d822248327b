"""What objects in X-ray images do to both models, as an object, a table, Markdown, HTML, JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from qtk import intervals
from qtk.report import page, picture
from qtk.table import finite, markdown, ruled

HEAD = ["scenes", "crafted on", "float", "95 %", "quantized", "95 %", "p", "item hidden"]
EFFECTS = ["effect", "crafted on", "seen by", "points", "95 %"]
LINES = (
    "Scenes as they are; the objects crafted on the float model, dark where they are thick, and "
    "the scenes with them; the same two lines for the quantized model."
)
FACTOR = 2  # of the contact sheet


@dataclass(frozen=True)
class Exposed:
    """One kind of scene, before it is counted.

    Attributes:
        right: [2, N] bool, of the float and the quantized model.
        hidden: mean share of the item's box that objects cover.
    """

    name: str
    crafted: str
    right: np.ndarray
    hidden: float


@dataclass(frozen=True)
class Row:
    """One kind of scene.

    Attributes:
        name: "clean", "balls, random places", "discs", "balls" or "shaped"; `crafted` on "float",
            "quantized" or "-".
        correct: of the float model, and `correct_quantized`; of `samples`.
        p: of McNemar's exact test that as many scenes become wrong by rounding as right.
        hidden: mean share of the item's box that objects cover.
    """

    name: str
    crafted: str
    samples: int
    correct: int
    correct_quantized: int
    p: float
    hidden: float


@dataclass(frozen=True)
class Effect:
    """A difference on the same scenes, `low` to `high` its 95 % interval (paired bootstrap).

    Attributes:
        name: "placement" (accuracy with balls at random places less at those looked for), "shape"
            (with balls less with shaped objects, same places), or "kept": the share of what shaped
            objects cost their own model that they cost the `reader`; nan where they cost nothing.
    """

    name: str
    crafted: str
    reader: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class XRay:
    """What objects do to both models.

    Attributes:
        shapes: vertices [objects, V, 3] by the model they were crafted on; faces [F, 3].
        pictures: [5, n, 3, H, W], lines of the contact sheet.
    """

    rows: tuple[Row, ...]
    effects: tuple[Effect, ...]
    shapes: dict[str, Tensor]
    faces: Tensor
    pictures: Tensor
    material: str
    seed: int
    seconds: float
    gradients: str = "straight-through"
    title: ClassVar[str] = "Objects in X-ray images"

    def drop(self, name: str, crafted: str, model: str) -> float:
        """How much accuracy scenes of one kind cost a model, "float" or "quantized"."""
        rows = {(row.name, row.crafted): row for row in self.rows}
        own, clean = rows[name, crafted], rows["clean", "-"]
        field = "correct" if model == "float" else "correct_quantized"
        return float((getattr(clean, field) - getattr(own, field)) / own.samples)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, shapes as lists, without the pictures."""
        told = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("pictures", "faces"):
            del told[name]
        told |= {name: [asdict(each) for each in told[name]] for name in ("rows", "effects")}
        return finite({**told, "shapes": {k: v.tolist() for k, v in self.shapes.items()}})

    def table(self) -> str:
        """Plain text: a line a kind of scene, and what placing and shaping did."""
        lines = [*ruled(HEAD, self._cells()), "", *ruled(EFFECTS, self._effects())]
        return "\n".join([*lines, "", *self._remarks()])

    def markdown(self) -> str:
        """The same in Markdown."""
        lines = [*markdown(HEAD, self._cells()), "", *markdown(EFFECTS, self._effects()), ""]
        return "\n".join([*lines, *(f"{remark}\n" for remark in self._remarks())])

    def html(self) -> str:
        """The same for a page (`qtk.trust_page`), with the contact sheet."""
        shown = picture.inline(self.contact_sheet(), "scenes, thickness, attacked scenes")
        tables = page.table(HEAD, self._cells()), page.table(EFFECTS, self._effects())
        remarks = map(page.paragraph, self._remarks())
        return "\n".join([*tables, page.figure(shown, LINES), *remarks])

    def contact_sheet(self, file: str | Path | None = None) -> Tensor:
        """[3, H', W']: scenes, thickness, attacked scenes; written as PNG to `file`."""
        made = picture.sheet(list(self.pictures), FACTOR)
        if file is not None:
            picture.write(made, file)
        return made

    def _cells(self) -> list[list[str]]:
        return [
            [row.name, row.crafted, *_share(row.correct, row.samples),
             *_share(row.correct_quantized, row.samples), f"{row.p:.3g}",
             f"{100 * row.hidden:.1f} %"]
            for row in self.rows
        ]  # fmt: skip

    def _effects(self) -> list[list[str]]:
        return [
            [
                e.name,
                e.crafted,
                e.reader,
                _points(e.value),
                f"{_points(e.low)} to {_points(e.high)}",
            ]
            for e in self.effects
        ]

    def _remarks(self) -> list[str]:
        return [
            f"accuracy in %, {self.rows[0].samples} scenes, objects of {self.material}, seed "
            f"{self.seed}; gradients straight-through, scored without",
            "placement and shape: points of accuracy that they cost",
            "kept: % of the whole cost of shaped objects that the other model has",
        ]


def exposure(
    seen: Sequence[Exposed], shapes: dict[str, Tensor], faces: Tensor, pictures: Tensor,
    material: str, seed: int, seconds: float,
) -> XRay:  # fmt: skip
    """Counts, and what follows from them."""
    rows = []
    for each in seen:
        one, other = each.right
        p = intervals.mcnemar(int((one & ~other).sum()), int((~one & other).sum()))
        rows.append(Row(each.name, each.crafted, len(one), int(one.sum()), int(other.sum()), p,
                        each.hidden))  # fmt: skip
    effects = tuple(_effects({(each.name, each.crafted): each.right for each in seen}, seed))
    return XRay(tuple(rows), effects, shapes, faces, pictures, material, seed, seconds)


def _effects(right: dict[tuple[str, str], np.ndarray], seed: int) -> list[Effect]:
    n = right["clean", "-"].shape[1]
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), intervals.DRAWS)
    counts = np.concatenate([np.ones((1, n), int), draws])  # the sample itself, then its draws
    share = {key: counts @ value.T / n for key, value in right.items()}  # [1 + draws, 2]
    readers, found = ("float", "quantized"), []
    for place, own in enumerate(readers):
        for name, worse, better in (
            ("placement", ("balls", own), ("balls, random places", "-")),
            ("shape", ("shaped", own), ("balls", own)),
        ):
            found.append(_effect(name, own, own, (share[better] - share[worse])[:, place]))
        cost = share["clean", "-"] - share["shaped", own]
        with np.errstate(divide="ignore", invalid="ignore"):
            kept = cost[:, 1 - place] / cost[:, place]
        kept[cost[:, place] <= 0] = np.nan
        found.append(_effect("kept", own, readers[1 - place], kept))
    return found


def _effect(name: str, crafted: str, reader: str, values: np.ndarray) -> Effect:
    known = values[1:][~np.isnan(values[1:])]
    low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (np.nan, np.nan)
    return Effect(name, crafted, reader, float(values[0]), float(low), float(high))


def _points(value: float) -> str:
    return "-" if np.isnan(value) else f"{100 * value:+.1f}"


def _share(hits: int, samples: int) -> Sequence[str]:
    low, high = intervals.wilson(hits, samples)
    return f"{100 * hits / samples:.1f}", f"{100 * low:.1f} to {100 * high:.1f}"
