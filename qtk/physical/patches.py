"""qtk.naturalness: for a given naturalness, does a patch fool the quantized model better?

A universal patch is learned on one model for

    - CE(model(shown), label) + weight (5 - score(shown)) + TV / 1000,

Adam over pixels, images at eight places a step, once for each weight: a front of success against
naturalness. The assessor whose score is in the loss does not judge: an attack on an assessor is an
adversarial example of it. Another one of another seed does, and the formula of `ratings`, which no
network has seen.
"""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qtk.errors import CalibrationError, SchemeError
from qtk.fidelity.compare import check_pair
from qtk.integrity import checksum, fingerprint
from qtk.intervals import DRAWS
from qtk.physical import ratings
from qtk.physical.assessment import scored
from qtk.physical.front import CONTROLS, Front, Naturalness, Point, hypervolume
from qtk.physical.kept import Kept
from qtk.physical.scores import score
from qtk.pipeline.progress import progress_bar
from qtk.robust.attack import patch as square
from qtk.robust.images import Images, Normalize, Pixels, frozen, read

WEIGHTS = (0.0, 0.1, 1.0, 10.0)
SHOWN = 8  # images of a line of the contact sheet
BATCH = 250
Seen = dict[str, np.ndarray]  # [N]: who is fooled, and what judges say
Places = tuple[Images, Tensor, dict[str, np.ndarray]]  # images, corners, who is right without patch


def naturalness(
    model: nn.Module,
    qmodel: nn.Module,
    craft: Any,
    test: Any,
    assessor: nn.Module,
    judge: nn.Module,
    processor: Any = None,
    *,
    weights: Sequence[float] = WEIGHTS,
    side: int = 8,
    steps: int = 100,
    rows: int = square.ROWS,
    normalize: Normalize | None = None,
    resume: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Naturalness:
    """The front of success and naturalness on each model, and of each model's patches on the other.

    Args:
        model: a classifier of images in floating point; `qmodel` quantized from it.
        craft: what patches are learned on, in any form that `qtk.robustness` takes, such as (pixels
            [N, 3, H, W] in [0, 1], labels [N]); `test` others, on which they are judged.
        assessor: of naturalness (`qtk.physical.naturalness.train`), whose score is in the loss.
        judge: another one, of another seed.
        processor: image processor; looked for beside the model.
        weights: of naturalness in the loss, a patch each.
        side: of the patch, pixels.
        steps: of Adam, each on `rows` images.
        normalize: mean and std a channel, where there is no processor to say it.
        resume: a folder that keeps every finished patch, and is gone on from.
        seed: of the patch to begin with, of places, and of the bootstrap.
        progress: shows a bar.

    Raises:
        ModelError: no classifier of images, or an assessor without five classes.
        CalibrationError: images or labels that do not fit, or no image that both models have right.
        SchemeError: a weight below zero, a patch larger than the image, or the same assessor twice.
    """
    start = time.perf_counter()
    _check(model, qmodel, assessor, judge, weights, min(steps, rows))
    given = [read(model, part, processor, normalize) for part in (craft, test)]
    size = min(given[0].pixels.shape[2:])
    if not 2 <= side < size:
        raise SchemeError(f"a patch of {side} pixels on images of {size}: choose 2 to {size - 1}")
    models = {"float": model, "quantized": qmodel}
    with frozen(model, qmodel, assessor, judge), progress_bar(progress) as bar:
        readers = {k: Pixels(m, given[0].mean, given[0].std) for k, m in models.items()}
        judges = {"assessor": assessor, "judge": judge}
        kept = Kept(resume, fingerprint(assessor), side, steps, rows, seed)
        places = _placed(given[1], readers, side, seed)
        learn = partial(_learned, given[0], assessor, side, steps, rows, seed)
        patches = _controls(given[0].pixels, side, seed)
        for done, (name, weight) in enumerate((n, w) for n in models for w in weights):
            bar.show(f"patch on {name}, weight {weight:g}", done, len(models) * len(weights))
            facts = [fingerprint(models[name]), weight, _data(given[0])]
            make = partial(learn, readers[name], weight)
            patches[name, weight] = kept.get(facts, make)["patch"]
        seen = {key: _seen(places, own, readers, judges) for key, own in patches.items()}
    points = tuple(_point(key, found, places[2]) for key, found in seen.items())
    return Naturalness(
        points, *_fronts(seen, places[2], weights, seed),
        torch.stack([_pasted(places, own)[:SHOWN] for own in patches.values()]),
        len(given[1].labels), side, seed, time.perf_counter() - start,
    )  # fmt: skip


def _learned(
    craft: Images, assessor: nn.Module, side: int, steps: int, rows: int, seed: int,
    reader: nn.Module, weight: float,
) -> dict[str, Tensor]:  # fmt: skip
    """The same beginning and the same places whatever the weight."""

    def unnatural(shown: Tensor) -> Tensor:
        return weight * (ratings.LEVELS - score(assessor, shown)).mean()

    x = craft.pixels
    generator = torch.Generator().manual_seed(seed)
    found = square.learn(reader, x, craft.labels, side / x.shape[2], generator, steps,
                         unnatural if weight else None, rows)  # fmt: skip
    return {"patch": (found * 255).round() / 255}


def _controls(pixels: Tensor, side: int, seed: int) -> dict[tuple[str, float], Tensor]:
    """What any square does: the pixels that learning begins with, and the images' mean colour."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(pixels.shape[1], side, side, generator=generator)
    plain = pixels.mean((0, 2, 3))[:, None, None].expand_as(noise)
    controls = zip(CONTROLS, (noise, plain), strict=True)
    return {(name, 0.0): (own * 255).round() / 255 for name, own in controls}


def _placed(test: Images, readers: dict[str, Pixels], side: int, seed: int) -> Places:
    corners = square.corners(test.pixels, side, torch.Generator().manual_seed(seed + 1))
    right = {name: _right(own, test.pixels, test.labels) for name, own in readers.items()}
    if not np.logical_and.reduce(list(right.values())).any():
        raise CalibrationError("no test image is right on both models: are these their labels?")
    return test, corners, right


def _pasted(places: Places, patch: Tensor) -> Tensor:
    test, corners, _ = places
    return square.paste_at(patch, test.pixels, corners)


def _seen(
    places: Places, patch: Tensor, readers: dict[str, Pixels], judges: dict[str, nn.Module]
) -> Seen:
    """Scored without gradients: which images are right, and what each judge says of them."""
    test, corners, _ = places
    shown, side = _pasted(places, patch), patch.shape[-1]
    found = {name: _right(own, shown, test.labels) for name, own in readers.items()}
    found |= {name: scored(own, shown) for name, own in judges.items()}
    boxes = torch.cat([corners, corners + side], 1)
    return {**found, "formula": ratings.truth(test.pixels, shown, boxes).double().numpy()}


@torch.no_grad()
def _right(reader: nn.Module, pixels: Tensor, labels: Tensor) -> np.ndarray:
    """[N] bool"""
    return np.asarray(torch.cat([reader(x).argmax(1) for x in pixels.split(BATCH)]) == labels)


def _point(key: tuple[str, float], found: Seen, clean: dict[str, np.ndarray]) -> Point:
    crafted, weight = key
    lost = {name: int((was & ~found[name]).sum()) for name, was in clean.items()}
    right = {name: int(was.sum()) for name, was in clean.items()}
    return Point(
        crafted, weight, lost["float"], right["float"], lost["quantized"], right["quantized"],
        *(float(found[judge].mean()) for judge in ("assessor", "judge", "formula")),
    )  # fmt: skip


def _fronts(
    seen: dict[tuple[str, float], Seen], clean: dict[str, np.ndarray], weights: Sequence[float],
    seed: int,
) -> tuple[tuple[Front, ...], tuple[Front, ...]]:  # fmt: skip
    """Hypervolumes by who crafted and who saw; and what quantizing changes, drawn in pairs."""
    n = len(next(iter(clean.values())))
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), DRAWS)
    counts = np.concatenate([np.ones((1, n), int), draws])  # the sample itself, then its draws
    volumes = {}
    for judge in ("judge", "formula"):
        for crafted in clean:
            for reader, was in clean.items():
                own = [seen[crafted, weight] for weight in weights]
                lost = np.stack([was & ~found[reader] for found in own], 1)
                share = counts @ lost / np.maximum(counts @ was, 1)[:, None]
                mean = counts @ np.stack([found[judge] for found in own], 1) / n
                volumes[judge, crafted, reader] = hypervolume(share, mean)
    fronts = tuple(_front(*key, value) for key, value in volumes.items())
    apart = tuple(
        _front(judge, crafted, f"{reader} less float",
               volumes[judge, crafted, reader] - volumes[judge, "float", "float"])
        for judge in ("judge", "formula")
        for crafted, reader in (("float", "quantized"), ("quantized", "quantized"))
    )  # fmt: skip
    return fronts, apart


def _front(judge: str, crafted: str, reader: str, values: np.ndarray) -> Front:
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return Front(judge, crafted, reader, float(values[0]), float(low), float(high))


def _data(images: Images) -> list[object]:
    return [checksum(images.pixels), checksum(images.labels), *images.mean, *images.std]


def _check(
    model: nn.Module, qmodel: nn.Module, assessor: nn.Module, judge: nn.Module,
    weights: Sequence[float], steps: int,
) -> None:  # fmt: skip
    check_pair(model, qmodel)
    if not weights or min(weights) < 0 or len(set(weights)) < len(weights) or steps < 1:
        raise SchemeError(f"weights {list(weights)}, {steps} steps: give different weights, none "
                          "below zero, and a step")  # fmt: skip
    if fingerprint(assessor) == fingerprint(judge):
        raise SchemeError("assessor and judge are one network: train the judge with another seed")
