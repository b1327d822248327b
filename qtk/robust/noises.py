"""What a model answers where decoding, resizing, colours or arithmetic are not as in training."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import product
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qtk.discover import load
from qtk.errors import CalibrationError
from qtk.robust.cells import Bits, Found
from qtk.robust.images import Images, Pixels, as_pixels
from qtk.robust.study import Heard, Study, right

ROOM = "robust.system"
GRID = ("decode", "resize", "colour")  # whose variants are combined
ENLARGED = 1.5  # how much larger a picture comes that is no larger than what the model reads


def heard(study: Study, models: dict[str, nn.Module], chosen: Sequence[str]) -> Iterator[Heard]:
    """Each variant of each cause that is chosen.

    Args:
        models: by role, as transformers made them.
    """
    for cause in chosen:
        part = load(ROOM, cause)
        for variant in _variants(part, study.images):
            found = _answers(study, models, cause, part, variant)
            yield Heard(cause, "system", variant, None, found)


def grid(study: Study) -> Iterator[Heard]:
    """Each combination of decoder, resizer and colours; one decoder where there are no files."""
    for names in product(*(load(ROOM, cause).VARIANTS for cause in GRID)):
        if names[0] == "pillow" or study.images.files:
            found = _heard(study, {"part": "grid", "names": list(names)}, _piped, *names)
            yield Heard("grid", "grid", ", ".join(names), None, found)


def _variants(part: ModuleType, images: Images) -> Iterator[str]:
    """Those that may differ from the clean pipeline; of resizers the first one, too, as pictures
    come to them in another size than to it."""
    names = list(part.VARIANTS)
    if part.STAGE == "file" and not images.files:
        raise CalibrationError(
            "suite 'decode' compares decoders of files: give a folder, or a list of (path or "
            "bytes, label)"
        )
    yield from names if part.STAGE == "size" else names[1:]


def _answers(
    study: Study, models: dict[str, nn.Module], cause: str, part: ModuleType, variant: str
) -> Found:
    facts = {"part": cause, "variant": variant}
    if part.STAGE == "file":
        return _heard(study, facts, _decoded, variant)
    if part.STAGE == "size":
        return _heard(study, facts, _piped, "pillow", variant, "rgb")
    if part.STAGE == "image":
        return _heard(study, facts, _coloured, variant)
    study.say(f"{cause} {variant}")
    run = _preprocessed if part.STAGE == "pixels" else _in_arithmetic
    function = part.VARIANTS[variant]
    return study.heard(facts, lambda role: run(study, models[role], function))


def _heard(
    study: Study, facts: dict[str, Any], prepare: Callable[..., Tensor], *names: str
) -> Found:
    """Every model on the images that `prepare` makes."""
    study.say(f"{facts['part']} {', '.join(names)}")
    made = cache(lambda: prepare(study.images, *names))
    return study.heard(facts, lambda role: study.right(role, made()))


def _decoded(images: Images, decoder: str) -> Tensor:
    """Decoded otherwise; sized, where need be, as `resize`'s first variant does."""
    size = _size(images)
    fit = next(iter(load(ROOM, "resize").VARIANTS.values()))
    decoded = [load(ROOM, "decode").VARIANTS[decoder](file) for file in images.files]
    return as_pixels(np.stack([x if x.shape[:2] == size else fit(x, size) for x in decoded]))


def _coloured(images: Images, colour: str) -> Tensor:
    function = load(ROOM, "colour").VARIANTS[colour]
    return as_pixels(np.stack([function(image) for image in images.bytes_of_pixels()]))


def _piped(images: Images, decoder: str, resizer: str, colour: str) -> Tensor:
    """From file to pixels. Pictures that are too small to be shrunk come ENLARGED (Lanczos)."""
    size = _size(images)
    fit, paint = (
        load(ROOM, cause).VARIANTS[name]
        for cause, name in (("resize", resizer), ("colour", colour))
    )
    enlarge = load(ROOM, "resize").VARIANTS["pillow lanczos"]
    larger = tuple(round(ENLARGED * side) for side in size)
    if images.files:
        decode = load(ROOM, "decode").VARIANTS[decoder]
        sources: Any = (decode(file) for file in images.files)
    else:
        sources = images.bytes_of_pixels()
    found = [
        paint(fit(x if min(x.shape[:2]) > min(size) else enlarge(x, larger), size)) for x in sources
    ]
    return as_pixels(np.stack(found))


def _size(images: Images) -> tuple[int, int]:
    H, W = images.pixels.shape[2:]
    return H, W


@torch.no_grad()
def _preprocessed(study: Study, model: nn.Module, function: Callable[..., Tensor]) -> Bits:
    images = study.images
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (images.mean, images.std))
    changed = function((images.pixels - mean) / std, mean, std)
    plain = Pixels(model, (0.0,) * len(images.mean), (1.0,) * len(images.std))
    return right(plain, changed, images.labels, study.batch_size)


def _in_arithmetic(
    study: Study, model: nn.Module, function: Callable[[nn.Module], nn.Module]
) -> Bits:
    images = study.images
    changed = Pixels(function(model), images.mean, images.std)
    return right(changed, images.pixels, images.labels, study.batch_size)
