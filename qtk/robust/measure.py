"""Float and quantized model side by side: the same attacks on the same samples."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from qtk.errors import SchemeError
from qtk.fidelity.compare import check_pair
from qtk.integrations.sentence_transformers import unwrap
from qtk.integrations.transformers import open_model
from qtk.integrity import checksum, digest, fingerprint
from qtk.modules.linear import QuantLinear
from qtk.robust import images, sanity, texts
from qtk.robust.cells import Cells
from qtk.robust.corruptions import SEVERITIES, check, contact_sheet
from qtk.robust.images import Normalize, Pixels, frozen
from qtk.robust.precision import Expected, RandomPrecision
from qtk.robust.result import Robustness
from qtk.robust.rows import attacked, disturbed, notes_on
from qtk.robust.sentences import TextStudy
from qtk.robust.study import ADAPTIVE, FLOAT, QUANTIZED, SECOND, Study
from qtk.robust.suite import Budgets, Suite, parts_of, suite_of
from qtk.scheme import is_positive_int

Models = dict[str, nn.Module]
Place = str | os.PathLike[str]


def robustness(
    model: nn.Module | Place,
    qmodel: nn.Module | Place,
    data: Any,
    suite: str | Sequence[str] = "attacks",
    tokenizer: Any = None,
    *,
    second: nn.Module | Place | None = None,
    normalize: Normalize | None = None,
    samples: int | None = None,
    budgets: Budgets = ("small", "mid"),
    steps: int = 10,
    severities: Sequence[int] = SEVERITIES,
    thorough: bool = True,
    sheet: Place | None = None,
    batch_size: int = 64,
    resume: Place | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Robustness:
    """Tries both models with the same attacks, on the same samples, with the same seeds.

    Args:
        model: a classifier in floating point, or its path or hub name.
        qmodel: quantized from it, likewise.
        data: (pixels [N, C, H, W] in [0, 1] or uint8, labels [N]); a folder with a folder of images
            a class; a list of (image, label); for suite="text" a list of (text, class).
        suite: "attacks", "corruptions" (the 19 of ImageNet-C), "system" (decoders, resizers, NV12,
            int8 preprocessing, 16-bit floats), "grid" (decoders, resizers and colours combined),
            "text"; names of qtk/robust/attack ("pgd_linf", "patch"), of corruptions ("fog") or of
            qtk/robust/system ("resize"); or a list of these.
        tokenizer: tokenizer or image processor; looked for beside the model.
        second: the same scheme calibrated with another seed: the floor below which a difference
            says nothing.
        normalize: mean and std a channel, where there is no processor to say it.
        samples: how many are drawn from the data at most; None for all.
        budgets: of "small", "mid" and "large": linf .5, 2 and 8 /255; l2 .5, 2 and 8, l1 100, 400
            and 1600 at 224 pixels, scaled to the images' size so that a pixel's share is the same
            (RobustART's); or {"linf": [...], "l2": [...], ...}.
        steps: of the attacks that go step by step; Square has ten queries for each.
        severities: of corruptions, 1 to 5.
        thorough: False spares an image the other attacks of a level once APGD on the cross entropy
            has it wrong, rounded and not, whoever answers: their rows are of both attacks, and the
            worst case, which has no use for more, comes sooner.
        sheet: a PNG to write, that shows every corruption at every severity.
        batch_size: images at once.
        resume: a folder that keeps what was found, and is gone on from.
        seed: of the samples, of every random start and of the bootstrap.
        progress: shows a bar.

    Returns:
        Rows, checks and a conclusion; see `Robustness`.

    Raises:
        QtkError: the data or the models do not fit, a name does not exist, or an extra is missing;
            each message says which and what to do.
    """
    started = time.monotonic()
    asked = _checked(suite, steps, batch_size)
    given = unwrap(model, data, tokenizer)
    models = _opened(given.model, qmodel, second)
    chosen = check(severities)
    if sheet is not None and not asked.corruptions:
        raise SchemeError("sheet shows corruptions, and the suite has none: add 'corruptions'")
    settings = {"steps": steps, "batch_size": batch_size, "seed": seed}
    keeper = partial(_cells, resume, models, settings)
    with frozen(*models.values()), _bar(progress) as say:
        told: dict[str, Any] = {**settings, "say": say}
        notes: tuple[str, ...] = ()
        if asked.is_text:
            found = texts.read(models[FLOAT], given.data, given.tokenizer, samples, seed)
            cells = keeper(list(found.sentences), found.labels.tolist())
            study: Any = TextStudy(found, models, cells, **told)
            parts, checks = parts_of(asked.attacks, budgets, 1), []
            rows, floor, _ = attacked(study, parts, seed)
        else:
            seen = images.read(models[FLOAT], given.data, given.tokenizer, normalize, samples, seed)
            cells = keeper(checksum(seen.pixels), seen.labels.tolist(), seen.mean, seen.std)
            readers = {role: Pixels(one, seen.mean, seen.std) for role, one in models.items()}
            if isinstance(random := models[QUANTIZED], RandomPrecision):
                readers[ADAPTIVE] = Pixels(Expected(random), seen.mean, seen.std)
            study = Study(seen, readers, cells, **told)
            parts = parts_of(asked.attacks, budgets, seen.pixels[0].numel())
            rows, floor, crafted = attacked(study, parts, seed, thorough)
            checks = sanity.checks(study, parts, crafted) if parts else []
            more, apart = disturbed(study, models, asked, chosen, seed)
            rows, floor, notes = [*rows, *more], floor | apart, notes_on(seen, asked, thorough)
            if sheet is not None:
                contact_sheet(seen.pixels, asked.corruptions, chosen, seed, sheet)
    gradients = any(part.module.GRADIENTS for part in parts)
    return Robustness(
        rows[0].samples, seed, "straight-through" if gradients else "none", asked.names,
        tuple(rows), tuple(checks), floor, notes, time.monotonic() - started,
        _bits(models[QUANTIZED]),
    )  # fmt: skip


def _checked(suite: str | Sequence[str], steps: int, batch_size: int) -> Suite:
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        if not is_positive_int(value):
            raise SchemeError(f"{name}={value!r}: give a positive integer")
    return suite_of(suite)


def _opened(model: Any, qmodel: Any, second: Any) -> Models:
    """The models by role, of one kind."""
    models = {FLOAT: open_model(model), QUANTIZED: _opened_one(qmodel)}
    if second is not None:
        models[SECOND] = _opened_one(second)
    for role in list(models)[1:]:
        check_pair(models[FLOAT], models[role])
    return models


def _bits(model: nn.Module) -> float | None:
    """Of the weights, mean over the quantized linears; of drawn bits their mean."""
    if isinstance(model, RandomPrecision):
        return sum(model.bits) / len(model.bits)
    layers = (m.scheme.w for m in model.modules() if isinstance(m, QuantLinear))
    found = [w.bits for w in layers if w is not None]
    return sum(found) / len(found) if found else None


def _opened_one(model: Any) -> Any:
    return model if isinstance(model, RandomPrecision) else open_model(unwrap(model).model)


def _cells(folder: Place | None, models: Models, settings: dict[str, Any], *data: object) -> Cells:
    if folder is None:
        return Cells(None, {})
    for one in models.values():
        if isinstance(one, RandomPrecision):
            one.switch(max(one.bits))  # a fingerprint is of what is stored
            settings = {**settings, "bits": one.bits, "draw": one.draw}
    prints = {role: fingerprint(one) for role, one in models.items()}
    return Cells(Path(folder), {"models": prints, **settings, "data": digest(*data)})


@contextmanager
def _bar(show: bool) -> Iterator[Callable[[str], None]]:
    """A line on the terminal that says what is being done, or nothing."""
    if not show:
        yield lambda text: None
        return
    from rich.console import Console

    with Console(stderr=True).status("robustness") as status:
        yield status.update
