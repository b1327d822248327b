"""Bags that are drawn: clutter of three materials, and one prohibited item of iron or none."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qtk import integrity
from qtk.errors import CalibrationError
from qtk.physical.colour import colour

SIZE = 64
NAMES = ("none", "blade", "gun", "scissors", "wrench")
MIX = {"plastic": 0.6, "aluminium": 0.3, "iron": 0.1}
NOISE = 0.01
PARTS = ("images", "labels", "boxes")
Plane = NDArray[np.floating]


@dataclass(frozen=True)
class Scenes:
    """Bags.

    Attributes:
        images: [N, 3, 64, 64] in [0, 1]; labels: [N], places in `NAMES`.
        boxes: [N, 4]: left, top, right, bottom of the item, ends excluded; of the middle of the bag
            where there is none.
    """

    images: Tensor
    labels: Tensor
    boxes: Tensor

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Images, labels, boxes."""
        return self.images, self.labels, self.boxes

    def save(self, file: str | Path) -> None:
        """To a .safetensors file, as the command line reads it."""
        held = {name: t.contiguous() for name, t in zip(PARTS, self.parts(), strict=True)}
        integrity.write(Path(file), held, {})

    @classmethod
    def load(cls, file: str | Path) -> "Scenes":
        """What `save` wrote.

        Raises:
            CheckpointError: it cannot be read. CalibrationError: it holds something else.
        """
        held, _ = integrity.read(Path(file))
        if set(held) != set(PARTS):
            raise CalibrationError(f"{file} holds {', '.join(held)}, not {', '.join(PARTS)}")
        return cls(*(held[name] for name in PARTS))

    def part(self, start: int, stop: int) -> "Scenes":
        return Scenes(self.images[start:stop], self.labels[start:stop], self.boxes[start:stop])


def draw(n: int, seed: int = 0) -> Scenes:
    """n bags: 6 to 12 things, one item in four of five; noise of .01 and 8 bits."""
    rng = np.random.default_rng(seed)
    images, labels, boxes = [], rng.integers(0, len(NAMES), n), []
    for label in labels:
        image = np.ones((SIZE, SIZE, 3))
        for _ in range(rng.integers(6, 13)):
            material = str(rng.choice(list(MIX), p=list(MIX.values())))
            image *= _shown(_clutter(rng), rng.uniform(0.05, 0.6), material)
        mask = np.zeros((SIZE, SIZE), dtype=bool)
        if label:
            u, v = _local(rng, rng.uniform(8, 14))
            mask = ITEMS[NAMES[label]](u, v)
            image *= _shown(mask, rng.uniform(0.15, 0.5), "iron")
        boxes.append(_box(mask))
        image = np.clip(image + rng.normal(0, NOISE, image.shape), 0, 1)
        images.append(np.round(image * 255) / 255)
    stacked = torch.from_numpy(np.stack(images)).float().permute(0, 3, 1, 2).contiguous()
    return Scenes(stacked, torch.from_numpy(labels), torch.tensor(boxes))


def _shown(mask: NDArray[np.bool_], depth: float, material: str) -> Plane:
    shade = colour(torch.tensor(depth, dtype=torch.float64), material).numpy()
    return np.where(mask[..., None], shade, 1.0)


def _local(rng: np.random.Generator, radius: float) -> tuple[Plane, Plane]:
    """All pixels in a thing's own frame, turned by chance, in units of its radius."""
    x, y = rng.uniform(radius * 0.8, SIZE - radius * 0.8, 2)
    rows, columns = np.mgrid[:SIZE, :SIZE] + 0.5
    angle = rng.uniform(0, 2 * math.pi)
    dx, dy = (columns - x) / radius, (rows - y) / radius
    return dx * math.cos(angle) + dy * math.sin(angle), dy * math.cos(angle) - dx * math.sin(angle)


def _clutter(rng: np.random.Generator) -> NDArray[np.bool_]:
    """An ellipse, or what several half-planes leave."""
    u, v = _local(rng, rng.uniform(5, 18))
    flat = rng.uniform(0.3, 1)
    if rng.random() < 0.5:
        return u**2 + (v / flat) ** 2 < 1
    angles = rng.uniform(0, 2 * math.pi, 6)
    inside = [u * math.cos(a) + v * math.sin(a) < rng.uniform(0.3, 0.9) for a in angles]
    return np.logical_and.reduce([*inside, u**2 + v**2 < 1])


def _blade(u: Plane, v: Plane) -> NDArray[np.bool_]:
    return (abs(u) < 1) & (abs(v) < 0.05 + 0.13 * (1 - u))


def _gun(u: Plane, v: Plane) -> NDArray[np.bool_]:
    barrel = (abs(u) < 1) & (v > -0.4) & (v < 0.1)
    return barrel | ((u > -0.95) & (u < -0.45) & (v >= 0.1) & (v < 0.9))


def _scissors(u: Plane, v: Plane) -> NDArray[np.bool_]:
    return (abs(u) < 1) & ((abs(v - 0.7 * u) < 0.17) | (abs(v + 0.7 * u) < 0.17))


def _wrench(u: Plane, v: Plane) -> NDArray[np.bool_]:
    from_ring = np.hypot(u + 0.55, v)
    ring = (from_ring > 0.22) & (from_ring < 0.5)
    return ring | ((abs(v) < 0.16) & (u > -0.1) & (u < 1))


ITEMS: dict[str, Callable[[Plane, Plane], NDArray[np.bool_]]] = {
    "blade": _blade, "gun": _gun, "scissors": _scissors, "wrench": _wrench,
}  # fmt: skip


def _box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    if not mask.any():
        return SIZE // 2 - 10, SIZE // 2 - 10, SIZE // 2 + 10, SIZE // 2 + 10
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
