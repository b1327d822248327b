"""search(): bits for every unit under a budget, from measured losses and measured times."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from qtk.errors import SchemeError
from qtk.integrations.sentence_transformers import unwrap
from qtk.mixed_precision import latency, sensitivity
from qtk.mixed_precision.allocate import allocate
from qtk.mixed_precision.budget import Budget, read
from qtk.mixed_precision.costs import Costs
from qtk.mixed_precision.data import Data, first_rows, full_rows
from qtk.mixed_precision.latency import Latencies
from qtk.mixed_precision.loss import Judge
from qtk.mixed_precision.result import Point, Search
from qtk.mixed_precision.space import Pair, Space, default_schemes, name_of
from qtk.mixed_precision.verify import Lab, better_of, within_accuracy
from qtk.pipeline import opened
from qtk.pipeline.progress import Bar, progress_bar
from qtk.pipeline.state import check

logger = logging.getLogger("qtk")

OPTIONS: dict[str, Any] = {  # of quantize that a search passes on, and what they are by default
    "activations": "static", "weights": "symmetric", "group_size": None, "attention": "float",
    "softmax": "float", "softmax_bits": None, "method": None, "rounding": None, "ranges": None,
    "learn": None, "preset": None, "skip": None,
}  # fmt: skip
LOSSES = "losses.safetensors"
PROBED = 64  # samples that masks are measured on, and as many that layers alone are calibrated on
FRONT = 12  # points of the front


def search(
    model: nn.Module | str | Path,
    budget: str | Sequence[str],
    calib: Any = None,
    tokenizer: Any = None,
    *,
    schemes: Sequence[Pair] | None = None,
    verify: bool | int = True,
    batch_size: int = 16,
    latencies: str | Path | None = None,
    resume: str | Path | None = None,
    backend: str = "auto",
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> Search:
    """Chooses bits for the linears of the blocks under a budget; after OHQ.

    Losses come from forward passes of a float model in which some layers are quantized, times from
    the operations as they run on this device, and an integer program joins them. A budget of
    latency or bytes gives the smallest loss within it; one of accuracy the fewest bytes that keep
    it; both together the fewest bytes that keep all.

    Half of `calib` is held back: what is measured to verify was seen by no step before. An accuracy
    budget is kept by a bound that holds in 99 of 100 draws of such data; of data of another kind it
    says nothing.

    Args:
        model: in floating point, or the path or hub name of one.
        budget: "0.8x latency", "0.5x bytes" (of W8A8; "of float"), "12 ms", "6 MB", "cosine 0.99",
            "kl 0.01", "drop 0.5 %" (of answers), or several, joined by commas. Bytes are those of
            the searched layers.
        calib, tokenizer: as `qtk.quantize` takes them. Without data inputs are made up, and
            accuracy cannot be a budget.
        schemes: pairs (w, a) to choose from; by default six of integers, floating point, and FP8
            where the device has it.
        verify: quantizes what was chosen and measures it, beside the best single scheme within a
            budget of latency or bytes, which is the answer where it loses less; a number measures
            as many points of the front besides. An accuracy budget without it rests on predictions
            alone.
        batch_size: rows of the batch whose latency counts.
        latencies: a file of timings, read and extended, of any number of devices.
        resume: a folder that keeps the losses measured so far: an interrupted search goes on.
        backend, seed, progress: as `qtk.quantize` takes them.
        options: other options of `qtk.quantize`, which every model is quantized with.

    Raises:
        SchemeError: a budget that cannot be read or kept; the message states the feasible range.
        CalibrationError: data that is too little to tell.
        QtkError: as `qtk.quantize`.
    """
    budgets, chosen_options = read(budget), _options(options, seed)
    _check_batch_size(batch_size)
    folder = check(resume)
    kept = None if folder is None else folder / LOSSES
    given = unwrap(model, calib, tokenizer)
    model, calib, tokenizer = given.model, given.data, given.tokenizer
    source, blocks = opened(model, backend)
    pairs = default_schemes(next(source.parameters()).device) if schemes is None else schemes
    space = Space.of(source, blocks, pairs, calib, chosen_options)
    data = Data.of(source, calib, tokenizer, seed, budgets)
    with progress_bar(progress) as bar, torch.no_grad():
        times = _timed(source, space, data, batch_size, latencies, backend, bar)
        probe = first_rows(data.seen, PROBED)
        losses = sensitivity.measure(
            source, blocks, None if calib is None else probe, Judge.of(source, probe), space,
            seed=seed, backend=backend, randoms=sensitivity.RANDOM, resume=kept, report=bar.show,
        )  # fmt: skip
        costs = Costs(space, losses, times)
        lab = Lab(source, data, costs, chosen_options, backend, batch_size, bar)
        return _search(budgets, costs, lab, verify)


def bench_ops(
    model: nn.Module | str | Path,
    calib: Any = None,
    tokenizer: Any = None,
    *,
    schemes: Sequence[Pair] | None = None,
    batch_size: int = 16,
    latencies: str | Path | None = None,
    backend: str = "auto",
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> Latencies:
    """Times the operations of a model at every scheme, as they would really run on this device.

    Args:
        calib: gives the length of what is read; without, inputs are made up.
        model, tokenizer, schemes, batch_size, latencies, backend, seed, progress, options: as
            `search` takes them.
    """
    _check_batch_size(batch_size)
    chosen_options = _options(options, seed)
    given = unwrap(model, calib, tokenizer)
    model, calib, tokenizer = given.model, given.data, given.tokenizer
    source, blocks = opened(model, backend)
    pairs = default_schemes(next(source.parameters()).device) if schemes is None else schemes
    space = Space.of(source, blocks, pairs, calib, chosen_options)
    data = Data.of(source, calib, tokenizer, seed, ())
    with progress_bar(progress) as bar:
        return _timed(source, space, data, batch_size, latencies, backend, bar)


def _search(budgets: Sequence[Budget], costs: Costs, lab: Lab, verify: bool | int) -> Search:
    space = costs.space
    limits = {b: costs.limit(b) for b in budgets if not b.is_accuracy}
    costs.check(limits)
    within = [(costs.matrix(b.metric), limit) for b, limit in limits.items()]
    accuracy = [b for b in budgets if b.is_accuracy]
    checked: tuple[Point, ...] = ()
    if len(accuracy) > 1:
        raise SchemeError(f"{accuracy[0].text!r} and {accuracy[1].text!r}: give one of the two")
    if accuracy:
        point, checked = within_accuracy(accuracy[0], costs, lab, within, bool(verify))
    else:
        chosen = allocate(costs.matrix("loss"), within)
        if chosen is None:
            texts = ", ".join(b.text for b in budgets)
            raise SchemeError(f"budgets {texts}: each can be kept alone, not all together")
        point = costs.point("found", chosen)
        if verify:
            point, checked = better_of(point, costs, lab, within)
    _warn_of_slow(point, limits, costs)
    front = _front(costs)
    if verify and not isinstance(verify, bool):
        some = np.unique(np.linspace(0, len(front) - 1, min(verify, len(front))).astype(int))
        checked = (*(lab.measured(front[i]) for i in some), *checked)
    references = tuple(costs.point(name_of(p), space.uniform(p)) for p in space.schemes)
    return Search(
        tuple(b.text for b in budgets), lab.judge.metric, space, point, front, references, checked,
        costs.sensitivity, costs.latencies, lab.batch_size, lab.calib,
    )  # fmt: skip


def _warn_of_slow(point: Point, limits: Mapping[Budget, float], costs: Costs) -> None:
    """Says in the log where a model that was measured takes longer than a budget allows."""
    for budget, limit in limits.items():
        most = limit + costs.latencies.rest
        if budget.metric == "latency" and point.measured and point.measured.seconds > most:
            logger.warning(
                "budget %r is %.2f ms; what was found takes %.2f ms as measured, %.2f ms as "
                "predicted: a noisy machine, or a budget at the end of what is feasible",
                budget.text, 1e3 * most, 1e3 * point.measured.seconds, 1e3 * point.seconds,
            )  # fmt: skip


def _front(costs: Costs) -> tuple[Point, ...]:
    """The smallest loss for as many bytes, from few to many."""
    sizes, losses = costs.matrix("bytes"), costs.matrix("loss")
    limits = np.geomspace(sizes.min(1).sum(), sizes.max(1).sum(), FRONT)
    found = [allocate(losses, [(sizes, float(limit) * (1 + 1e-9))]) for limit in limits]
    distinct = dict.fromkeys(chosen for chosen in found if chosen is not None)
    return tuple(costs.point(f"front {i + 1}", chosen) for i, chosen in enumerate(distinct))


def _timed(
    source: Any, space: Space, data: Data, batch_size: int, latencies: Any, backend: str, bar: Bar
) -> Latencies:
    """On the longest batch of the data, cut or repeated to the size that is asked about."""
    path = None if latencies is None else Path(os.fspath(latencies))
    batch = full_rows(data.seen[-1], batch_size)
    return latency.measure(source, space, batch, backend=backend, path=path, report=bar.show)


def _check_batch_size(batch_size: object) -> None:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise SchemeError(f"batch_size={batch_size!r}: give a positive integer")


def _options(given: Mapping[str, Any], seed: int) -> dict[str, Any]:
    if unknown := [name for name in given if name not in OPTIONS]:
        raise SchemeError(f"search knows no {', '.join(unknown)}; choose {', '.join(OPTIONS)}")
    return {**OPTIONS, **given, "seed": seed}
