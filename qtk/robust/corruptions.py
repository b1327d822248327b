"""Corrupted images, at a size at which a corruption means what it does on a photograph."""

import os
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from torch import Tensor

from qtk import integrity
from qtk.discover import load
from qtk.errors import QtkError, SchemeError
from qtk.robust.cells import Found
from qtk.robust.corrupt import names
from qtk.robust.images import as_bytes, as_pixels
from qtk.robust.study import Heard, Study

SEVERITIES = (1, 2, 3, 4, 5)
GAP = 2  # pixels between the pictures of a contact sheet
RESIZED = "resized"  # the way up and down, and nothing else


def check(severities: Sequence[int]) -> tuple[int, ...]:
    """Severities in order.

    Raises:
        SchemeError: one that there is not, or none.
    """
    found = tuple(sorted({*severities}))
    if not found or any(severity not in SEVERITIES for severity in found):
        raise SchemeError(f"severities={tuple(severities)}: choose among {SEVERITIES}")
    return found


def corrupted(pixels: Tensor, name: str, severity: int, seed: int) -> Tensor:
    """Images [N, 3, H, W] in [0, 1], each corrupted with a seed of its own.

    Smaller images than the collection's SIDE are enlarged by a whole factor (bicubic), corrupted,
    and averaged back. `name` "resized" is the way there and back alone.
    """
    part = _collection(name)
    factor = factor_of(pixels)
    found = []
    for place, image in enumerate(as_bytes(pixels)):
        large = _enlarged(image, factor)
        if name != RESIZED:
            own = int(integrity.digest(seed, name, severity, place)[:7], 16)
            large = part.corrupt(name, large, severity, own)
        found.append(_averaged(np.asarray(large, np.uint8), factor))
    return as_pixels(np.stack(found))


def factor_of(pixels: Tensor, side: int = 96) -> int:
    """By how much images are enlarged: until their short side has `side` pixels."""
    return max(1, -(-side // min(pixels.shape[2:])))


def heard(study: Study, chosen: Sequence[str], severities: Sequence[int]) -> Iterator[Heard]:
    """Each corruption at each severity; where images are enlarged, that alone first."""
    wanted = [(name, severity) for name in chosen for severity in severities]
    if chosen and factor_of(study.images.pixels) > 1:
        yield Heard(RESIZED, "clean", "", None, _answers(study, RESIZED, 0))
    for name, severity in wanted:
        found = _answers(study, name, severity)
        yield Heard(name, "corruption", f"{severity}", severity, found)


def contact_sheet(
    pixels: Tensor, chosen: Sequence[str], severities: Sequence[int], seed: int,
    file: str | os.PathLike[str],
) -> None:  # fmt: skip
    """A PNG to look at: a line a corruption, one image clean and at every severity.

    Args:
        pixels: [N, 3, H, W]; each line shows the next image.
    """
    lines = []
    for k, name in enumerate(chosen):
        one = pixels[k % len(pixels)][None]
        shown = [one, *(corrupted(one, name, severity, seed) for severity in severities)]
        lines.append(np.concatenate([_framed(as_bytes(x)[0]) for x in shown], 1))
    sheet = np.concatenate(lines, 0)
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    _pillow().fromarray(sheet).save(part, format="PNG")
    integrity.put(part, path)


def _answers(study: Study, name: str, severity: int) -> Found:
    study.say(f"{name} {severity or ''}")
    made = cache(lambda: corrupted(study.images.pixels, name, severity, study.seed))
    facts = {"part": name, "severity": severity}
    return study.heard(facts, lambda role: study.right(role, made()))


@cache
def _collection(name: str) -> ModuleType:
    return load("robust.corrupt", "imagenet_c" if name == RESIZED else names()[name])


def _enlarged(image: np.ndarray, factor: int) -> np.ndarray:
    if factor == 1:
        return image
    H, W, _ = image.shape
    library = _pillow()
    large = library.fromarray(image).resize((W * factor, H * factor), library.Resampling.BICUBIC)
    return np.asarray(large)


def _averaged(image: np.ndarray, factor: int) -> np.ndarray:
    """The mean of each factor x factor square."""
    H, W, C = image.shape
    squares = image.reshape(H // factor, factor, W // factor, factor, C).astype(np.float32)
    return np.rint(squares.mean((1, 3))).astype(np.uint8)


def _framed(image: np.ndarray) -> np.ndarray:
    return np.pad(image, ((GAP, GAP), (GAP, GAP), (0, 0)), constant_values=255)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise QtkError("corruptions need pillow: pip install 'qtk-torch[robust]'") from None
    return Image
